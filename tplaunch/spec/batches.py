"""Samples of a step: its global batch, and all that come before it; pure functions, so every rank and resume agrees."""

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
    """Samples that the steps before `step` (from 1) consume, when all are trained by this recipe."""
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
