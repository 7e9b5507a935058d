"""A rate over a run, piece after piece: where each begins and ends, and its value at every step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tplaunch.recipe.schema import LrSchedule, Piece, Shape
from tplaunch.spec.batches import Batches
from tplaunch.units import Length

Along = Literal["steps", "tokens"]


class Formula(NamedTuple):
    """A rate by how far the run is.

    Args:
        kind: its shape.
        start, to: the rates that it leads from and to.
        along: what counts how far: steps, or tokens.
        begin, end: where it begins and ends, in these.
        stair: how long a rate that goes in steps stays, in these, and what it is then multiplied by.
    """

    kind: Shape
    start: float
    to: float = 0.0
    along: Along = "steps"
    begin: int = 0
    end: int = 0
    stair: tuple[int, float] = (1, 1.0)

    def at(self, before: int, after: int) -> float:
        """The rate of a step.

        Args:
            before, after: where it begins and ends.
        """
        if self.kind == "constant":
            return self.start
        if self.kind == "step":
            every, factor = self.stair
            return self.start * factor ** ((before - self.begin) // every)
        if self.kind == "inverse-sqrt":
            return self.start * math.sqrt(self.begin / after)
        done, whole = after - self.begin, max(1, self.end - self.begin)
        if self.kind == "warmup":
            return self.start + (self.to - self.start) * min(done, whole) / whole
        progress = min(1.0, max(0.0, done / whole))
        if self.kind == "exponential":
            return self.start * (self.to / self.start) ** progress if self.start else 0.0
        shape = 1 - progress
        if self.kind == "cosine":
            shape = (1 + math.cos(math.pi * progress)) / 2
        elif self.kind == "1-sqrt":
            shape = 1 - math.sqrt(progress)
        return self.to + (self.start - self.to) * shape


class Part(NamedTuple):
    """Steps `first` to `last` of a run, and their rate."""

    first: int
    last: int
    formula: Formula


@dataclass(frozen=True)
class Curve:
    """A rate over a run. After its last step it stays on the last piece's course, which ends where that does."""

    batches: Batches
    parts: Sequence[Part]

    def part(self, step: int) -> Part:
        """The part of a step."""
        return self.parts[min(bisect_left(self.parts, step, key=lambda part: part.last), len(self.parts) - 1)]

    def at(self, step: int) -> float:
        """The rate of a step."""
        formula = self.part(step).formula
        if formula.kind == "constant":
            return formula.start
        if formula.along == "steps":
            return formula.at(step - 1, step)
        return formula.at(self.batches.tokens(step - 1), self.batches.tokens(step))


def spans(pieces: Sequence[Piece], batches: Batches, steps: int) -> list[tuple[int, int]]:
    """Steps done before each piece, and when it has ended. Pieces that do not fit the run end before they begin, or
    not where the run does.

    A step belongs to the piece in which it begins; so a piece ends with the first step that ends at or after its end.
    Of pieces one after the other that are said in one unit, lengths add up to the end: no rounding does.
    """
    ends: list[int] = []
    place: Length | None = Length(0)
    for piece in pieces:
        if piece.until is not None:
            place = batches.place(piece.until)
        elif piece.for_ is None or place is None:
            place = None  # from here on by the end of the run, backwards
        else:
            place = moved(place, batches.place(piece.for_), batches)
        ends.append(-1 if place is None else batches.reach(place))
    end = _end(batches, steps)
    for number in range(len(pieces) - 1, -1, -1):
        if ends[number] != -1:
            break
        ends[number] = steps if number == len(pieces) - 1 else batches.reach(end)
        if (lasting := pieces[number].for_) is not None:
            end = moved(end, batches.place(lasting), batches, back=True)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def before_last(lasting: Length, batches: Batches, steps: int) -> int:
    """Steps before the last of a run that take so much."""
    return batches.reach(moved(_end(batches, steps), batches.place(lasting), batches, back=True))


def _end(batches: Batches, steps: int) -> Length:
    """Where the run ends, as its length was said."""
    return Length(steps) if batches.run.unit == "steps" else batches.run


def moved(place: Length, by: Length, batches: Batches, *, back: bool = False) -> Length:
    """A place so much later, or earlier."""
    at = place.amount
    if place.unit != by.unit:
        at = batches.consumed(batches.reach(place), by.unit)
    return Length(max(0, at - by.amount) if back else at + by.amount, by.unit)


def curve(pieces: Sequence[Piece], highest: float, batches: Batches, steps: int) -> Curve:
    """The rate that pieces make.

    Args:
        highest: where a warmup leads to, and where the first piece begins that is none.
        steps: of the run.
    """
    parts: list[Part] = []
    rate = 0.0 if pieces[0].kind == "warmup" else highest
    for piece, (begin, end) in zip(pieces, spans(pieces, batches, steps), strict=True):
        start = rate if piece.from_ is None else piece.from_
        parts.append(Part(begin + 1, end, _formula(piece, start, highest, begin, end, batches)))
        rate = Curve(batches, parts[-1:]).at(max(1, end))
    return Curve(batches, parts)


def staged(
    base: Curve, rates: Sequence[float | Piece | None], ends: Sequence[int], highest: float, batches: Batches
) -> Curve:
    """A rate with another one in some stages.

    Args:
        base: the rate without them.
        rates: of each stage: a constant, a piece, or None, where it is the base's.
        ends: the last step of each.
        highest: see `curve`.
    """
    parts: list[Part] = []
    for rate, begin, end in zip(rates, [0, *ends[:-1]], ends, strict=True):
        if rate is None:
            inside = [part for part in base.parts if part.first <= end and part.last > begin]
            inside = inside or [base.part(end)]  # its last goes on
            parts += [
                Part(max(part.first, begin + 1), end if part is inside[-1] else part.last, part.formula)
                for part in inside
            ]
            continue
        piece = rate if isinstance(rate, Piece) else Piece(kind="constant", from_=rate)
        start = piece.from_
        if start is None:
            start = Curve(batches, parts).at(begin) if parts else 0.0 if piece.kind == "warmup" else highest
        parts.append(Part(begin + 1, end, _formula(piece, start, highest, begin, end, batches)))
    return Curve(batches, _joined(parts))


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The same with parts of one formula, one after the other, as one."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].formula == part.formula:
            part = part._replace(first=found.pop().first)
        found.append(part)
    return found


def _formula(piece: Piece, start: float, highest: float, begin: int, end: int, batches: Batches) -> Formula:
    """The rate of steps `begin` + 1 to `end`."""
    to = (highest if piece.kind == "warmup" else 0.0) if piece.to is None else piece.to
    lasting = piece.for_ or piece.until
    unit = batches.place(lasting).unit if lasting else batches.run.unit
    if piece.kind == "constant":
        return Formula("constant", start)
    if piece.kind == "step":
        stair = batches.place(piece.every or Length(1))
        every = int(stair.amount) * (batches.seq_len(begin + 1) if stair.unit == "samples" else 1)
        along: Along = "steps" if stair.unit == "steps" else "tokens"
        stairs = (every, piece.factor or 1.0)
        return Formula("step", start, along=along, begin=batches.consumed(begin, along), stair=stairs)
    if piece.kind == "inverse-sqrt":
        along = "steps" if unit == "steps" else "tokens"
        return Formula("inverse-sqrt", start, along=along, begin=batches.consumed(begin, along))
    return Formula(piece.kind, start, to, *_along(unit, begin, end, batches))


def _along(unit: str, begin: int, end: int, batches: Batches) -> tuple[Along, int, int]:
    """What counts how far a stretch of steps is, and its ends in that. Where all batches are alike, steps tell the same
    as tokens: the rate is the same to the last bit, however the length was said."""
    if unit == "steps" or len(batches.sizes(begin + 1, max(begin + 1, end))) == 1:
        return "steps", begin, end
    return "tokens", batches.tokens(begin), batches.tokens(end)


def shorthand(schedule: LrSchedule, peak: float, batches: Batches, steps: int) -> Curve:
    """The rate of `warmup_steps` and `decay`: linear from 0, then the peak, then to `min_lr` over the last
    `decay_steps` of the run: by default all that follow the warmup. wsd (warmup-stable-decay, Hu et al. 2024, arXiv
    2404.06395) is linear, by default over the last tenth."""
    warm, least, lasting = batches.reach(schedule.warmup_steps), schedule.min_lr, schedule.decay_steps
    parts: list[Part] = []
    if warm:
        along = _along(batches.place(schedule.warmup_steps).unit, 0, warm, batches)
        parts.append(Part(1, warm, Formula("warmup", 0.0, peak, *along)))
    last = max(steps, warm + 1)  # of a run that is all warmup, too
    if schedule.decay == "constant":
        return Curve(batches, [*parts, Part(warm + 1, last, Formula("constant", peak))])
    if lasting is not None:
        begin, unit = before_last(lasting, batches, steps), batches.place(lasting).unit
    else:
        begin, unit = (steps - max(1, steps // 10) if schedule.decay == "wsd" else warm), batches.run.unit
    if begin > warm:
        parts.append(Part(warm + 1, begin, Formula("constant", least + (peak - least))))
    kind: Shape = "cosine" if schedule.decay == "cosine" else "linear"
    parts.append(Part(max(warm, begin) + 1, last, Formula(kind, peak, least, *_along(unit, begin, steps, batches))))
    return Curve(batches, parts)
