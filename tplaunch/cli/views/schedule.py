"""The course of a run in a few lines."""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby, zip_longest

from tplaunch.spec.course import Course
from tplaunch.spec.mixture import Mixture, mixture_of
from tplaunch.spec.pieces import Curve
from tplaunch.units import format_count

_WIDTH = 118
_BARS = " ▁▂▃▄▅▆▇█"
_MANY = 4  # sizes of the batch, or pieces of a rate, beyond which a line would be too long


def schedule_lines(course: Course) -> Iterator[str]:
    """Learning rate, and where they change batch size and weight decay: piece by piece."""
    lines = [f"learning rate: {_rate(course, course.rates)}"]
    if len({(block.size, block.seq_len) for block in course.batches.blocks}) > 1:
        lines.append(f"batch size: {_sizes(course)}")
    if course.recipe.optimizer.weight_decay_schedule is not None:
        lines.append(f"weight decay: {_rate(course, course.decays)}")
    mixture = mixture_of(course)
    if mixture is not None and len(mixture.ends) > 1:
        lines.append(f"mixture: {_mixture(course, mixture)}")
    yield from (textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in lines)


def _mixture(course: Course, mixture: Mixture) -> str:
    if len(mixture.ends) > _MANY:
        return f"{len(mixture.ends)} ones of {len(mixture.names)} corpora, one after the other"
    parts = []
    for end, shares in zip(mixture.ends, mixture.shares, strict=True):
        read = [
            f"{100 * share:.3g}% {name}" if share < 1 else name
            for name, share in zip(mixture.names, shares, strict=True)
            if share
        ]
        few = read if len(read) <= _MANY else [*read[:_MANY], f"{len(read) - _MANY} more"]
        parts.append(" + ".join(few) + _until(course, end))
    return ", ".join(parts)


def stage_bars(course: Course, width: int) -> Iterator[str]:
    """The stages of a run and the share of each corpus in a line each, as wide as the run is long in tokens."""
    stages, mixture = course.recipe.training.stages or (), mixture_of(course)
    titles = ["stages", *(mixture.names if mixture else ())]
    left = min(max(map(len, titles)), width // 3)
    room = max(1, width - left - 1)
    ends = [course.batches.tokens(steps.stop - 1) * room // course.tokens for steps in course.stages]
    if stages:
        yield f"{'stages':>{left}} " + "".join(
            f"|{stage.name or number}"[: end - begin].ljust(end - begin)
            for number, (stage, begin, end) in enumerate(zip(stages, [0, *ends[:-1]], ends, strict=True), 1)
        )
    if mixture is None:
        return
    places = [course.at_tokens((2 * column + 1) * course.tokens // (2 * room)).step for column in range(room)]
    parts = [bisect_left(mixture.ends, step) for step in places]
    for number, name in enumerate(mixture.names):
        bars = "".join(_BARS[round(mixture.shares[part][number] * (len(_BARS) - 1))] for part in parts)
        yield f"{name[:left]:>{left}} {bars}"


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
    blocks = [next(alike) for _, alike in groupby(blocks, lambda block: (block.size, block.seq_len))]
    ends = [block.step for block in blocks[1:]]
    longer = len({block.seq_len for block in blocks}) > 1
    sizes = [f"{block.size:,}{f' x {block.seq_len:,}' * longer}" for block in blocks]
    if len(blocks) <= _MANY:
        untils = [_until(course, end) for end in ends]
        return ", ".join(size + until for size, until in zip_longest(sizes, untils, fillvalue="")) + " tokens" * longer
    many = f"{len(blocks)} {'shapes' if longer else 'sizes'}"
    return f"{sizes[0]} to {sizes[-1]}{' tokens' * longer} in {many}{_until(course, ends[-1])}"


def _until(course: Course, step: int) -> str:
    if step >= course.steps:
        return ""
    return f" until step {step:,} ({format_count(course.batches.tokens(step))} tokens)"
