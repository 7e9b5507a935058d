"""Parameter counts of papers, slices, FLOPs, and layers of each stage."""

from __future__ import annotations

import pytest

from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model, Recipe
from tplaunch.spec.flops import matmul_parameters, model_flops_per_token
from tplaunch.spec.parameters import block_parameters, parameter_count, parameter_shapes, stage_parameters
from tplaunch.spec.stages import balanced_layers, layer_costs


def model(preset: str, **changes: object) -> Model:
    return Model.model_validate({"preset": preset, **PRESETS[preset], **changes})


def recipe(preset: str, *, topology: dict[str, object], **training: object) -> Recipe:
    sections = {
        "name": "test",
        "model": {"preset": preset, **PRESETS[preset]},
        "topology": topology,
        "training": {"seq_len": 8192, "global_batch_size": 64, "steps": 10, **training},
        "data": {"train": "data/train"},
    }
    return Recipe.model_validate(sections)


def test_gpt3_and_megatron_1t_by_their_papers() -> None:
    # Narayanan et al. 2021, equation 2: 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)), plus the final norm's 2 h.
    def megatron(layers: int, hidden: int, vocab: int, positions: int) -> int:
        return 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + positions) * hidden + 2 * hidden

    assert parameter_count(model("megatron-1t")) == megatron(128, 25600, 51200, 2048)
    assert round(parameter_count(model("megatron-1t")) / 1e9) == 1008  # table 1
    assert parameter_count(model("gpt3-175b")) == megatron(96, 12288, 50257, 2048)
    assert round(parameter_count(model("gpt3-175b")) / 1e9) == 175  # Brown et al. 2020, table 2.1


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_shapes_add_up_and_names_are_unique(preset: str) -> None:
    spec = model(preset)
    parameters = parameter_shapes(spec)
    assert sum(p.count for p in parameters) == parameter_count(spec, padded=True)
    assert len({p.name for p in parameters}) == len(parameters)
    assert any(p.name == "output.weight" for p in parameters) != spec.tie_embeddings


def test_slices_cover_each_parameter_as_often_as_it_is_copied() -> None:
    for preset in ("llama3-8b", "gpt2-124m", "qwen3-8b"):
        spec = model(preset)
        for tp in (1, 2, 4):
            for parameter in parameter_shapes(spec):
                assert parameter.local_count(tp) * tp == parameter.count * parameter.copies(tp)


def test_key_value_heads_fewer_than_ranks_are_copied() -> None:
    by_name = {p.name: p for p in block_parameters(model("llama3-70b"), 0)}  # 64 heads, 8 key/value heads
    assert by_name["layers.0.attention.wk.weight"].local_shape(16) == (128, 8192)
    assert by_name["layers.0.attention.wk.weight"].copies(16) == 2
    assert by_name["layers.0.attention.wq.weight"].local_shape(16) == (512, 8192)
    assert by_name["layers.0.attention.wo.weight"].local_shape(16) == (8192, 512)
    assert by_name["layers.0.mlp.down.weight"].local_shape(16) == (8192, 1792)
    assert by_name["layers.0.attention_norm.weight"].copies(16) == 16
    with pytest.raises(ValueError, match="8 pieces cannot be shared by tp=12"):
        by_name["layers.0.attention.wk.weight"].local_shape(12)


def test_stages_hold_every_parameter_once_and_a_tied_copy() -> None:
    spec = model("gpt2-124m")
    first = stage_parameters(spec, range(6), first=True, last=False)
    last = stage_parameters(spec, range(6, 12), first=False, last=True)
    names = [p.name for p in first + last]
    assert names.count("embedding.weight") == 2
    assert set(names) == {p.name for p in parameter_shapes(spec)}
    assert len(names) == len(set(names)) + 1


def test_vocabulary_is_padded_in_shapes_only() -> None:
    spec = model("gpt2-124m")
    assert parameter_shapes(spec)[0].shape == (50304, 768)
    assert parameter_count(spec, padded=True) - parameter_count(spec) == (50304 - 50257) * 768


def test_flops_by_hand() -> None:
    # Narayanan et al. 2021, appendix: 72 B s l h^2 (1 + s / (6 h) + V / (12 l h)) without recomputation.
    layers, hidden, vocab, s = 128, 25600, 51200, 2048
    expected = 72 * layers * hidden**2 * (1 + s / (6 * hidden) + vocab / (12 * layers * hidden))
    assert model_flops_per_token(model("megatron-1t"), s) == pytest.approx(expected, rel=1e-12)
    # Llama 3 405B: 3.8e25 FLOPs for 15.6T tokens (arXiv 2407.21783, section 1).
    assert model_flops_per_token(model("llama3-405b"), 8192) * 15.6e12 == pytest.approx(3.8e25, rel=0.1)
    assert matmul_parameters(model("llama3-8b")) == 8_030_261_248 - 128256 * 4096 - 65 * 4096


def test_llama_405b_is_split_as_its_report_says() -> None:
    topology = {"tp": 8, "pp": 16, "schedule": "interleaved1f1b", "virtual_stages": 4}
    layers = balanced_layers(recipe("llama3-405b", topology=topology))
    assert layers == [1] + [2] * 62 + [1]  # one block fewer on the first and on the last stage


def test_costs_of_the_ends_shift_layers_to_the_middle() -> None:
    even = recipe("llama3-8b", topology={"pp": 4})
    embedding, head = layer_costs(even)[:2]
    assert 0 < embedding < 0.1
    assert 2 < head < 3.5
    layers = balanced_layers(even)
    assert sum(layers) == 32
    assert layers[-1] < min(layers[:-1])
    with pytest.raises(ValueError, match="32 layers cannot fill 64 stages"):
        balanced_layers(recipe("llama3-8b", topology={"pp": 64}))
