"""The course of a run in a few lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from tplaunch.spec.course import Course
from tplaunch.spec.pieces import Curve
from tplaunch.units import format_count

_WIDTH = 118
_MANY = 4  # sizes of the batch, or pieces of a rate, beyond which a line would be too long


def schedule_lines(course: Course) -> Iterator[str]:
    """Learning rate, and where they change batch size and weight decay: piece by piece."""
    lines = [f"learning rate: {_rate(course, course.rates)}"]
    if len(course.batches.blocks) > 1:
        lines.append(f"batch size: {_sizes(course)}")
    if course.recipe.optimizer.weight_decay_schedule is not None:
        lines.append(f"weight decay: {_rate(course, course.decays)}")
    yield from (textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in lines)


def _rate(course: Course, curve: Curve) -> str:
    words = []
    for number, part in enumerate(curve.parts):
        formula, last = part.formula, min(part.last, course.steps)
        if last < part.first:
            break
        end = f"{curve.at(last):.3g}"
        if formula.kind == "constant":
            text = f"{end} constant"
        else:
            text = f"{formula.kind} {f'{formula.start:.3g} ' if not number else ''}to {end}"
        words.append(text + _until(course, last))
    return ", ".join(words)


def _sizes(course: Course) -> str:
    blocks = [block for block in course.batches.blocks if block.step < course.steps]
    ends = [block.step for block in blocks[1:]]
    if len(blocks) <= _MANY:
        steps = [f"{block.size:,}{_until(course, end)}" for block, end in zip(blocks, ends, strict=False)]
        return ", ".join([*steps, f"{blocks[-1].size:,}"])
    return f"{blocks[0].size:,} to {blocks[-1].size:,} in {len(blocks)} sizes{_until(course, ends[-1])}"


def _until(course: Course, step: int) -> str:
    if step >= course.steps:
        return ""
    return f" until step {step:,} ({format_count(course.batches.tokens(step))} tokens)"
