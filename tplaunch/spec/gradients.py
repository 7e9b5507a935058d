"""Where the gradients of weights are added up over a step's microbatches, and by what."""

from __future__ import annotations

from tplaunch.recipe.schema import Parallelism, Recipe
from tplaunch.spec.schedules import SCHEDULES


def are_flat(layout: Parallelism) -> bool:
    """Whether weights and gradients lie in flat buffers, not under FSDP2."""
    return layout.zero <= 1 or (layout.dp == 1 and layout.cp == 1)


def backward_is_whole(layout: Parallelism) -> bool:
    """Whether no backward pass runs in two halves."""
    return layout.pp == 1 or not SCHEDULES[layout.schedule].splits_backward


def are_added_in_place(recipe: Recipe) -> bool:
    """Whether the matmul that computes a weight's gradient adds it to the sum itself. Then the loss makes all gradients
    in its forward pass, while its logits exist; else its backward pass computes them again."""
    return are_flat(recipe.topology) and backward_is_whole(recipe.topology)
