"""Which samples a step takes. Torch-free; a pure function of the step, so that any rank and any resume agree."""

from __future__ import annotations

from tplaunch.recipe.schema import Recipe


def batch_size(recipe: Recipe, step: int) -> int:
    """Samples of step number `step` (from 1): the global batch size, or its ramp-up's."""
    training = recipe.training
    ramp = training.batch_ramp_up
    if ramp is None:
        return training.global_batch_size
    return min(training.global_batch_size, ramp.start + ramp.increment * ((step - 1) // ramp.steps))


def first_sample(recipe: Recipe, step: int) -> int:
    """Samples consumed by the steps before `step` (from 1)."""
    training, ramp = recipe.training, recipe.training.batch_ramp_up
    if ramp is None:
        return (step - 1) * training.global_batch_size
    total, done = 0, 0
    while done < step - 1:  # one turn for each size of the ramp
        size = batch_size(recipe, done + 1)
        if size == training.global_batch_size:
            return total + (step - 1 - done) * size
        count = min(ramp.steps, step - 1 - done)
        total, done = total + count * size, done + count
    return total


def share(recipe: Recipe, step: int, dp_rank: int, dp: int) -> range:
    """Sample numbers of one data-parallel rank at a step: a contiguous 1/dp of the global batch."""
    size = batch_size(recipe, step) // dp
    start = first_sample(recipe, step) + dp_rank * size
    return range(start, start + size)
