"""Presets against the published parameter counts."""

from __future__ import annotations

import pytest

from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model
from tplaunch.spec.parameters import active_parameter_count, parameter_count

# What the published checkpoints hold, tied weights once (safetensors metadata of the models' repositories); of Gemma 3
# the text model (without embeddings as in arXiv 2503.19786, table 1, rounded there).
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_404_352,  # transformers' model: without multi-token prediction and the router's corrections
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gpt2-124m": 124_439_808,
    "gpt2-xl": 1_557_611_200,
}
# Papers that give rounded counts: Brown et al. 2020 table 2.1; Narayanan et al. 2021 table 1.
ROUNDED = {"gpt3-175b": (174.6e9, 0.1e9), "megatron-1t": (1008.0e9, 0.1e9)}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name: str) -> None:
    count = parameter_count(Model.model_validate(PRESETS[name]))
    if name in ROUNDED:
        published, rounding = ROUNDED[name]
        assert abs(count - published) <= rounding
    else:
        assert count == PUBLISHED[name]


# Billions: arXiv 2401.04088; mistral.ai/news/mixtral-8x22b; arXiv 2505.09388; arXiv 2412.19437.
ACTIVE = {
    "mixtral-8x7b": (12.9, 0.05),
    "mixtral-8x22b": (39, 0.5),
    "qwen3-30b-a3b": (3.3, 0.06),
    "qwen3-235b-a22b": (22, 0.5),
    "deepseek-v3": (37, 0.6),
}
# The model card of gpt-oss (arXiv 2508.10925, table 1) leaves the embedding out of what is active.
ACTIVE_WITHOUT_EMBEDDING = {"gpt-oss-20b": 3.61, "gpt-oss-120b": 5.13}


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str) -> None:
    published, rounding = ACTIVE[name]
    assert active_parameter_count(Model.model_validate(PRESETS[name])) / 1e9 == pytest.approx(published, abs=rounding)


@pytest.mark.parametrize("name", ACTIVE_WITHOUT_EMBEDDING)
def test_active_parameters_of_gpt_oss(name: str) -> None:
    model = Model.model_validate(PRESETS[name])
    active = active_parameter_count(model) - model.vocab_size * model.hidden_size
    assert active / 1e9 == pytest.approx(ACTIVE_WITHOUT_EMBEDDING[name], abs=0.005)


def test_all_parameters_of_a_dense_model_are_active() -> None:
    model = Model.model_validate(PRESETS["llama3-8b"])
    assert active_parameter_count(model) == parameter_count(model)


def test_every_published_count_has_its_preset() -> None:
    assert set(PUBLISHED) | set(ROUNDED) == set(PRESETS)
