"""The learning rate as a pure function of the step. Torch-free."""

from __future__ import annotations

import math

from tplaunch.recipe.schema import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of update number `step`, counted from 1.

    Linear from 0 over `warmup_steps`, then the peak, then to `min_lr` by the shape of `decay` over the last
    `decay_steps` of the run: by default all that follow the warmup. wsd (warmup-stable-decay, Hu et al. 2024, arXiv
    2404.06395) is linear, by default over the last tenth.
    """
    peak, schedule, total = recipe.optimizer.lr, recipe.lr_schedule, recipe.training.steps
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    length = max(1, total // 10) if schedule.decay == "wsd" else total - schedule.warmup_steps
    length = schedule.decay_steps or length
    progress = min(1.0, max(0.0, (step - (total - length)) / max(1, length)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    return schedule.min_lr + (peak - schedule.min_lr) * shape
