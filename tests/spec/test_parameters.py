"""Parameter counts of papers, slices, FLOPs, and layers of each stage."""

from __future__ import annotations

import pytest

from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model, Recipe
from tplaunch.spec.flops import attention_flops_per_token, matmul_parameters, model_flops_per_token
from tplaunch.spec.parameters import (
    Parameter,
    block_parameters,
    layer_kinds,
    parameter_count,
    parameter_shapes,
    stage_parameters,
)
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
    assert sum(p.count for p in parameters if p.trained) == parameter_count(spec, padded=True)
    assert len({p.name for p in parameters}) == len(parameters)
    assert any(p.name == "output.weight" for p in parameters) != spec.tie_embeddings


def test_slices_cover_each_parameter_as_often_as_it_is_copied() -> None:
    for preset in ("llama3-8b", "gpt2-124m", "qwen3-8b"):
        spec = model(preset)
        for tp in (1, 2, 4):
            for parameter in parameter_shapes(spec):
                assert parameter.local_count(tp) * tp == parameter.count * parameter.copies(tp)


def test_key_value_heads_fewer_than_ranks_are_copied() -> None:
    found = {p.name: p for p in block_parameters(model("llama3-70b"), 0)}  # 64 heads, 8 key/value heads
    assert found["layers.0.attention.wk.weight"].local_shape(16) == (128, 8192)
    assert found["layers.0.attention.wk.weight"].copies(16) == 2
    assert found["layers.0.attention.wq.weight"].local_shape(16) == (512, 8192)
    assert found["layers.0.attention.wo.weight"].local_shape(16) == (8192, 512)
    assert found["layers.0.mlp.down.weight"].local_shape(16) == (8192, 1792)
    assert found["layers.0.attention_norm.weight"].copies(16) == 16
    with pytest.raises(ValueError, match="8 pieces cannot be shared by tp=12"):
        found["layers.0.attention.wk.weight"].local_shape(12)


def by_name(spec: Model, layer: int) -> dict[str, Parameter]:
    return {p.name.removeprefix(f"layers.{layer}."): p for p in block_parameters(spec, layer)}


def test_experts_are_cut_by_ep_and_expert_tp_alone() -> None:
    found = by_name(model("gpt-oss-20b"), 3)  # 32 experts, hidden 2880, ffn 2880
    shapes = {name: p.local_shape(64, ep=8, expert_tp=2) for name, p in found.items() if p.expert}
    assert shapes == {
        "moe.experts.gate.weight": (4 * 2880, 1440),
        "moe.experts.up.weight": (4 * 2880, 1440),
        "moe.experts.down.weight": (4 * 2880, 1440),
        "moe.experts.gate.bias": (4, 1440),
        "moe.experts.up.bias": (4, 1440),
        "moe.experts.down.bias": (4, 2880),  # added once, by every rank whole
    }
    router, bias = found["moe.router.weight"], found["moe.router.bias"]
    assert (router.shape, router.role, router.local_shape(8, ep=8)) == ((32, 2880), "router", (32, 2880))
    assert (bias.shape, bias.role, bias.expert) == ((32,), "bias", False)
    with pytest.raises(ValueError, match="32 experts cannot be shared by ep=3"):
        found["moe.experts.up.weight"].local_shape(1, ep=3)
    with pytest.raises(ValueError, match="2880 cannot be shared by expert_tp=7"):
        found["moe.experts.up.weight"].local_shape(1, expert_tp=7)


def test_layers_of_deepseek() -> None:
    spec = model("deepseek-v3")
    dense, mixture = by_name(spec, 2), by_name(spec, 3)
    assert {name for name in dense if name.startswith("m")} == {
        "mlp_norm.weight",
        "mlp.gate.weight",
        "mlp.up.weight",
        "mlp.down.weight",
    }
    assert {name: p.local_shape(4, ep=64) for name, p in mixture.items()} == {
        "attention_norm.weight": (7168,),
        "attention.wq_a.weight": (1536, 7168),
        "attention.q_a_norm.weight": (1536,),
        "attention.wq_b.weight": (32 * 192, 1536),
        "attention.wkv_a.weight": (512 + 64, 7168),
        "attention.kv_a_norm.weight": (512,),
        "attention.wkv_b.weight": (32 * 256, 512),
        "attention.wo.weight": (7168, 32 * 128),
        "mlp_norm.weight": (7168,),
        "moe.router.weight": (256, 7168),
        "moe.router.correction": (256,),
        "moe.experts.gate.weight": (4 * 7168, 2048),
        "moe.experts.up.weight": (4 * 7168, 2048),
        "moe.experts.down.weight": (4 * 7168, 2048),
        "moe.shared.gate.weight": (512, 7168),
        "moe.shared.up.weight": (512, 7168),
        "moe.shared.down.weight": (7168, 512),
    }
    assert [name for name, p in mixture.items() if not p.trained] == ["moe.router.correction"]
    assert layer_kinds(spec) == {0: 3, 3: 58}
    assert layer_kinds(spec, range(2, 6)) == {2: 1, 3: 3}
    assert layer_kinds(model("llama3-8b"), range(4, 8)) == {4: 4}


def test_a_correction_is_there_where_it_is_moved_or_was() -> None:
    spec = model("mixtral-8x7b")
    assert spec.moe is not None

    def corrected(rate: float | None) -> bool:
        moe = {**spec.moe.model_dump(), "bias_rate": rate} if spec.moe else {}
        return "moe.router.correction" in by_name(model("mixtral-8x7b", moe=moe), 0)

    assert [corrected(rate) for rate in (None, 0.0, 0.001)] == [False, True, True]


def test_queries_without_a_short_vector() -> None:
    latent = {"kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}  # DeepSeek-V2-Lite
    spec = model("deepseek-v3", latent=latent, num_heads=16, num_kv_heads=16, head_dim=None)
    assert spec.head_dim == 192
    found = by_name(spec, 0)
    assert found["attention.wq.weight"].local_shape(2) == (8 * 192, 7168)
    assert not {"attention.wq_a.weight", "attention.wq_b.weight", "attention.q_a_norm.weight"} & found.keys()


def test_flops_of_a_mixture_are_those_of_the_experts_that_are_chosen() -> None:
    spec = model("mixtral-8x7b")
    attention, expert = 4096 * (4096 * 2 + 1024 * 2), 3 * 4096 * 14336
    assert matmul_parameters(spec) == 32 * (attention + 8 * 4096 + 2 * expert) + 32000 * 4096
    # DeepSeek-V3 (arXiv 2412.19437) has heads of 192 channels that attend, and of 128 that are summed.
    assert attention_flops_per_token(model("deepseek-v3"), 10) == 2 * 128 * (192 + 128) * 10


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
