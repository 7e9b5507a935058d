"""Whether a checkpoint's model is the recipe's."""

from __future__ import annotations

from typing import Any

from tests.families import MODELS
from tplaunch.checkpoint.fit import model_differences
from tplaunch.recipe.schema import Model


def keys(stored: dict[str, Any], asked: dict[str, Any], *, weights_only: bool = False) -> list[str]:
    found = model_differences(stored, Model.model_validate(asked), weights_only=weights_only)
    return [key for key, _, _ in found]


def test_a_checkpoint_that_knew_fewer_fields() -> None:
    stored = Model.model_validate(MODELS["llama"]).model_dump(mode="json")
    older = {name: value for name, value in stored.items() if "window" not in name and "softcap" not in name}
    older["rope_scaling"] = MODELS["llama"]["rope_scaling"]
    assert keys(older, MODELS["llama"]) == []
    assert keys(older, {**MODELS["llama"], "window": 8}) == ["model.window"]


def test_weights_go_on_with_another_window_but_not_without_their_sinks() -> None:
    stored = Model.model_validate({**MODELS["llama"], "attention_sinks": True}).model_dump(mode="json")
    asked = {**MODELS["llama"], "attention_sinks": True, "window": 8, "attention_softcap": 9.0}
    assert keys(stored, asked, weights_only=True) == []
    assert keys(stored, {**asked, "attention_sinks": False}, weights_only=True) == ["model.attention_sinks"]


def test_one_model_said_in_two_ways() -> None:
    stored = Model.model_validate({**MODELS["llama"], "mlp_bias": False}).model_dump(mode="json")
    assert stored["mlp_bias"] is None  # as linear_bias
    assert keys(stored, MODELS["llama"]) == keys(stored, {**MODELS["llama"], "family": "granite"}) == []
    assert keys(stored, {**MODELS["llama"], "mlp_bias": True}) == ["model.mlp_bias"]


def test_experts_differ_by_field() -> None:
    moe = {"experts": 8, "top_k": 2, "ffn_hidden_size": 32}
    dense, asked = MODELS["llama"], {**MODELS["llama"], "moe": moe}
    stored = Model.model_validate(asked).model_dump(mode="json")
    assert keys(stored, asked) == []
    assert keys({**stored, "moe": moe}, asked) == [], "a version that knew fewer fields"
    assert keys(stored, dense) == keys(Model.model_validate(dense).model_dump(mode="json"), asked) == ["model.moe"]
    assert keys(stored, {**asked, "moe": {**moe, "top_k": 1}}) == ["model.moe.top_k"]
    assert keys(stored, {**asked, "moe": {**moe, "aux_loss": 0.1, "z_loss": 0.1}}) == [], "as a learning rate"
    assert keys(stored, {**asked, "moe": {**moe, "bias_rate": 0.001}}) == ["model.moe.bias_rate"]
    corrected = Model.model_validate({**asked, "moe": {**moe, "bias_rate": 0.001}}).model_dump(mode="json")
    assert keys(corrected, {**asked, "moe": {**moe, "bias_rate": 0.0}}) == []
