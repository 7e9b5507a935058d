"""The recipe that an imported model fills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tplaunch.recipe.schema import Model
from tplaunch.recipe.tree import Dumper


def model_recipe(folder: Path, model: Model, checkpoint: str, *, tokenizer: bool) -> str:
    """The part of a recipe that the model fills, as YAML; its paths are relative to it."""
    part: dict[str, Any] = {
        "model": model.model_dump(exclude_defaults=True),
        "checkpoint": {"initial": checkpoint},
    }
    if tokenizer:
        part["data"] = {"tokenizer": "tokenizer.json"}
    return f"# The model of {folder}, to be extended.\n{yaml.dump(part, Dumper=Dumper, sort_keys=False)}"
