"""A preset is what its family's config.json says: written and read again, it is the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tplaunch.huggingface.config import read_config, write_config
from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model

FAMILIES = {"mixtral": "mixtral", "qwen3-30b": "qwen3_moe", "qwen3-235b": "qwen3_moe", "deepseek": "deepseek_v3"}
FAMILIES |= {"gpt-oss": "gpt_oss", "qwen3-8b": "qwen3", "llama3": "llama", "gemma3": "gemma3_text", "gpt2": "gpt2"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_config(name: str, tmp_path: Path) -> None:
    model = Model.model_validate(PRESETS[name])
    seq_len = model.max_position or 4096
    written = write_config(model, seq_len=seq_len, precision="bf16", eod=0)
    expected = [family for start, family in FAMILIES.items() if name.startswith(start)]
    assert written["model_type"] in (expected or [written["model_type"]])
    (tmp_path / "config.json").write_text(json.dumps(written))
    said, read = model.model_dump(), read_config(tmp_path / "config.json").model.model_dump()
    if model.moe is not None and model.moe.bias_rate:  # an imported model's biases stay as they are
        said["moe"]["bias_rate"] = 0.0
    for fields in (said, read):
        fields.pop("family")
    assert read == said
