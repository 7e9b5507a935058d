"""How large a checkpoint is, and how many of a run's stay. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course
from tplaunch.spec.lora import adapted
from tplaunch.spec.optimizer import group_of, slots
from tplaunch.spec.parameters import parameter_shapes
from tplaunch.spec.precision import STORAGE_BYTES, state_bytes
from tplaunch.spec.run_stages import in_force, segments


@dataclass(frozen=True)
class Kept:
    """Checkpoints that are there when a run has ended.

    Args:
        count: how many.
        each: bytes of the tensors of one.
    """

    count: int
    each: int

    @property
    def bytes(self) -> int:
        return self.count * self.each


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of the tensors of a checkpoint: every parameter that is not frozen once, with its optimizer state."""
    optimizer = recipe.optimizer
    parameters = [p for p in adapted(parameter_shapes(recipe.model), recipe.lora) if not p.frozen]
    kept = STORAGE_BYTES[recipe.training.precision] * (1 + (recipe.training.ema is not None))
    moment = state_bytes(recipe)
    return sum(p.count * (kept + moment * len(slots(optimizer, group_of(optimizer, p).kind))) for p in parameters)


def kept_checkpoints(recipe: Recipe) -> Kept:
    """The checkpoints of a run that stay: the newest, those that stay for ever, and the best, which may be one more."""
    course, settings = Course(recipe), recipe.checkpoint
    saved = {segment.steps.stop - 1 for segment in segments(recipe)}  # workers save where they end
    for number, steps in enumerate(course.stages):
        saved.update(course.dues(in_force(recipe, number).checkpoint.every, steps))
    stay = {*sorted(saved)[-settings.keep :]}
    if settings.keep_every:
        stay |= saved & {*course.dues(settings.keep_every, range(1, course.steps + 1))}
    best = settings.keep_best is not None and len(saved) > len(stay)
    return Kept(len(stay) + best, checkpoint_bytes(recipe))
