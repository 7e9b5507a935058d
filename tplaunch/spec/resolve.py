"""Writes into a recipe what follows from its other fields, once, so that nobody derives it again."""

from __future__ import annotations

from typing import Any

from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import with_steps
from tplaunch.spec.stages import balanced_layers
from tplaunch.spec.topology import Topology


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with `topology.gpus_per_node` and `topology.stage_layers` stated, and `training.steps` beside its
    tokens or samples; values that it states stay.

    A resolved recipe is returned as it is. It is what crosses from the launcher to the workers.

    Raises:
        ValueError: dp is "auto", or there are fewer layers than stages.
    """
    recipe = with_steps(recipe)
    stated = recipe.topology
    update: dict[str, Any] = {}
    if stated.gpus_per_node is None:
        update["gpus_per_node"] = Topology.of(recipe).ranks_per_node
    if stated.stage_layers is None:
        update["stage_layers"] = balanced_layers(recipe)
    if not update:
        return recipe
    return recipe.model_copy(update={"topology": stated.model_copy(update=update)})
