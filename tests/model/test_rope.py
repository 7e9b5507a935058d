"""Rotary tables of every scaling are those of transformers, over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.families import MODELS
from tplaunch.model.rope import rope_table
from tplaunch.recipe.schema import Model

YARN = {"type": "yarn", "factor": 8.0, "original_max_position": 64}
SCALINGS: list[dict[str, Any]] = [
    {"factor": 8.0, "original_max_position": 64},
    {"type": "linear", "factor": 3.0},
    YARN,
    {**YARN, "attention_factor": 1.0},  # in place of the formula
    {**YARN, "attention_factor": 1.7, "mscale": 0.7, "mscale_all_dim": 0.3},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
    {**YARN, "mscale": 0.7},  # one of the two says nothing
    {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    {**YARN, "factor": 0.5},  # it shortens: no temperature
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_table_is_that_of_transformers(scaling: dict[str, Any]) -> None:
    model = Model.model_validate({**MODELS["llama"], "head_dim": 32, "rope_scaling": scaling})
    renamed = {"type": "rope_type", "original_max_position": "original_max_position_embeddings"}
    theirs = {renamed.get(name, name): value for name, value in scaling.items()}
    if "type" not in scaling:
        theirs |= {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(head_dim=32, rope_parameters={"rope_theta": model.rope_theta, **theirs})
    positions = torch.arange(600)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rope_table(model, positions, torch.float32)[:, :, 0, 0]
    torch.testing.assert_close(ours, torch.stack([cos[0], sin[0]]), rtol=0, atol=1e-5)


def test_layers_with_a_window_turn_by_their_own_theta() -> None:
    model = Model.model_validate(MODELS["gemma3"])
    plain = Model.model_validate({**MODELS["gemma3"], "rope_theta": 1e4, "rope_scaling": None})
    positions = torch.arange(100)
    window, full = (rope_table(model, positions, torch.float32, window=kind) for kind in (True, False))
    assert torch.equal(window, rope_table(plain, positions, torch.float32))
    assert not torch.allclose(window, full, atol=0.1)
