"""The outline of a recipe says what the recipe says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, resolved
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.recipe.outline import outline
from tplaunch.recipe.shipped import shipped_recipes


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Single values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            found[f"{prefix}{key}"] = value
    return found


@pytest.mark.parametrize("name", shipped_recipes())
def test_it_is_the_recipe(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert outline(dump_recipe(recipe)) == leaves(recipe.model_dump(by_alias=True))


def test_lists_and_odd_texts_do_not_confuse_it() -> None:
    raw = case(2, 2, 2)
    raw["data"] = {"train": [{"path": "a", "weight": 0.5}, {"path": "b: c", "weight": 0.5}], "validation": "x: y"}
    raw["logging"] = {"wandb": {"tags": ["a: b", "tp: 9"], "project": "it's 3"}}
    found = outline(dump_recipe(resolved(raw)))
    assert (found["topology.tp"], found["data.validation"]) == (2, "x: y")
    assert found["logging.wandb.project"] == "it's 3" and found["optimizer.lr"] == 3e-3
    assert "data.path" not in found and "data.train.path" not in found and "data.weight" not in found


def test_a_recipe_by_hand_is_read_as_yaml() -> None:
    found = outline("topology: {tp: 4, pp: 2}\ntraining: {steps: 10, seq_len: 8}\noptimizer: {lr: 3e-4}\n")
    assert found == {
        "topology.tp": 4,
        "topology.pp": 2,
        "training.steps": 10,
        "training.seq_len": 8,
        "optimizer.lr": 3e-4,
    }


@pytest.mark.parametrize(
    "text", ["", "\0", "a: [", "- 1\n- 2\n", "x" * 1000], ids=["empty", "nul", "torn", "list", "x"]
)
def test_what_is_no_recipe_has_no_values(text: str) -> None:
    assert outline(text) == {}
