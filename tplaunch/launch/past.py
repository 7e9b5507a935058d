"""Whether two recipes say the same of a run's steps: of all, and of those that it has behind it.

A schedule in pieces, and a run whose length is said in tokens or samples, say what was trained as well as what comes: a
past that differs is refused, unless it is allowed. The one-line shorthands stretch with the run: they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from math import isclose
from typing import NamedTuple

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course

# What says nothing else than the course of a run.
COURSE_KEYS = (
    "training.steps",
    "training.tokens",
    "training.samples",
    "training.stages",
    "training.global_batch_size",
    "training.batch_ramp_up",
    "training.batch_schedule",
    "lr_schedule",
    "optimizer.weight_decay_schedule",
)
_INSIDE = 16  # steps that are looked at where two shapes lie over each other: they meet in fewer


class Difference(NamedTuple):
    """The first step of which two recipes say another thing.

    Args:
        key: of the recipe, that says it.
        what: differs.
        step: the first that was found.
        was, now: what they say.
    """

    key: str
    what: str
    step: int
    was: float
    now: float


def same_course(was: Recipe, now: Recipe) -> bool:
    """Whether two recipes give every step the same batch size, learning rate and weight decay."""
    courses = Course(was), Course(now)
    steps = [course.steps for course in courses]
    return steps[0] == steps[1] and not [*differences(*courses, steps[0])]


def differences(was: Course, now: Course, last: int) -> Iterator[Difference]:
    """What differs in steps 1 to `last`: of each thing the first step that was found."""
    sizes = [block.step for course in (was, now) for block in course.batches.blocks]
    ways = ("stages", "batch_schedule", "batch_ramp_up")
    key = next((key for key in ways if getattr(now.recipe.training, key)), "global_batch_size")
    found = [
        _first(was.batch_size, now.batch_size, _steps(sizes, last, inside=0)),
        _first(was.batches.seq_len, now.batches.seq_len, _steps(sizes, last, inside=0)),
    ]
    names = [(f"training.{key}", "batch size"), ("training.stages", "length of samples")]
    curves = [
        (
            "lr_schedule.pieces" if now.recipe.lr_schedule.pieces else "lr_schedule",
            "learning rate",
            was.rates,
            now.rates,
        ),
        ("optimizer.weight_decay_schedule", "weight decay", was.decays, now.decays),
    ]
    for key, what, before, after in curves:
        names.append((key, what))
        turns = [
            *sizes,
            *(step for curve in (before, after) for part in curve.parts for step in (part.first - 1, part.last)),
        ]
        found.append(_first(before.at, after.at, _steps(turns, last, inside=_INSIDE)))
    for (key, what), one in zip(names, found, strict=True):
        if one is not None:
            yield Difference(key, what, *one)


def _steps(turns: Collection[int], last: int, *, inside: int) -> Iterator[int]:
    """The first and last step between any two places where something turns, and some between them."""
    places = sorted({0, last, *(turn for turn in turns if 0 < turn < last)})
    for begin, end in pairwise(places):
        count = min(end - begin, 2 + inside)
        yield from (begin + 1 + (end - begin - 1) * number // max(1, count - 1) for number in range(count))


def _first(
    was: Callable[[int], float], now: Callable[[int], float], steps: Iterator[int]
) -> tuple[int, float, float] | None:
    """The first step where two rates are not the same, but for how they are rounded."""
    pairs = ((step, was(step), now(step)) for step in steps)
    return next((pair for pair in pairs if not isclose(pair[1], pair[2], rel_tol=1e-12, abs_tol=1e-300)), None)


def _names_rate(course: Course, step: int) -> bool:
    """Whether the stage of a step says a rate of its own."""
    stages = course.recipe.training.stages
    return stages is not None and stages[course.batches.stage(step)].lr is not None


def past_problems(was: Recipe, now: Recipe, step: int, allow: Collection[str]) -> Iterator[Problem]:
    """What a recipe says of the steps up to a checkpoint that is not what was trained.

    Args:
        was: that of the launch before.
        now: goes on.
        step: of the checkpoint.
        allow: keys whose change is allowed, or sections that hold them.
    """
    both = (was, now)
    courses = Course(was), Course(now)
    staged = any(one.training.stages for one in both)
    said = {
        "length of samples": staged,
        "batch size": staged or any(one.training.batch_schedule or one.training.length.unit != "steps" for one in both),
        "learning rate": any(one.lr_schedule.pieces for one in both),
        "weight decay": any(one.optimizer.weight_decay_schedule for one in both),
    }
    for key, what, first, before, after in differences(*courses, step):
        said_there = what == "learning rate" and any(_names_rate(course, first) for course in courses)
        if (said[what] or said_there) and not any(key == one or key.startswith(f"{one}.") for one in allow):
            yield Problem(
                f"gives step {first} the {what} {after:g}; it was trained with {before:g}",
                why=f"the checkpoint of step {step} has that behind it: such a schedule says what was, and what comes",
                fix=f"change what comes after step {step} only, or go on: --allow-change {key}",
                key=key,
            )
