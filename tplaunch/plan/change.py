"""New values of some recipe keys, as planned, as printed for a shell, and as part of a recipe file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tplaunch.check.rules import can_run
from tplaunch.plan.case import Case
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.resolve import resolve
from tplaunch.spec.stages import balanced_layers


@dataclass(frozen=True)
class Change:
    """New values of some recipe keys.

    Args:
        values: dotted key -> value.
    """

    values: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(self.settings)

    @property
    def settings(self) -> list[str]:
        """Each value as the `KEY=VALUE` that --set takes."""
        return [f"{key}={_as_yaml(value)}" for key, value in self.values.items()]

    @property
    def options(self) -> str:
        """The command-line options that make the change, quoted for a shell."""
        return " ".join(f"--set {shlex.quote(setting)}" for setting in self.settings)

    def sections(self) -> dict[str, dict[str, Any]]:
        """The values by section, as plain data."""
        found: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            section, _, field = key.partition(".")
            found.setdefault(section, {})[field] = value.model_dump() if isinstance(value, BaseModel) else value
        return found

    def apply(self, case: Case) -> Case | None:
        """The case with the new values, resolved; None where it breaks a rule (`tplaunch.check.rules`).

        More ranks come in nodes of the same size. Layers that the recipe does not split itself are split anew.
        """
        recipe, values = case.recipe, dict(self.values)
        if "topology.stage_layers" not in values and recipe.topology.stage_layers == balanced_layers(recipe):
            values["topology.stage_layers"] = None
        changed = with_values(recipe, values)
        return Case(resolve(changed), case.gpu) if can_run(changed) else None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy of a recipe with other values of some dotted keys."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, field = key.partition(".")
        sections.setdefault(section, {})[field] = value
    new = {name: getattr(recipe, name).model_copy(update=fields) for name, fields in sections.items()}
    return recipe.model_copy(update=new)


def _as_yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {_as_yaml(field)}" for key, field in value.model_dump().items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)
