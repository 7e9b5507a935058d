"""The best of a tuning as a recipe file that extends the tuned one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tplaunch.plan.tune import Choice
from tplaunch.recipe.load import LoadedRecipe


def tuned_recipe(loaded: LoadedRecipe, overrides: Sequence[str], best: Choice, path: Path) -> str:
    """The recipe file that trains what was tuned, as YAML.

    Args:
        loaded: the recipe that was tuned.
        overrides: the `KEY=VALUE`s that it was loaded with; they are part of what was tuned.
        best: the topology to take.
        path: where the file will be, to which the path of the tuned recipe is relative.
    """
    stated = loaded.recipe.model_dump(mode="json", by_alias=True)
    content: dict[str, Any] = {"extends": os.path.relpath(loaded.path, path.resolve().parent)}
    for override in overrides:
        key = override.partition("=")[0]
        _set(content, key, _get(stated, key))
    for section, values in best.change.sections().items():
        for field, value in values.items():
            _set(content, f"{section}.{field}", value)
    # A calibrated GPU is named by its file, which a table's name would not bring along.
    _set(content, "hardware.gpu", loaded.recipe.hardware.gpu or best.plan.case.gpu.name)
    return yaml.safe_dump(content, sort_keys=False)


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value
