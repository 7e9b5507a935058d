"""What is wrong with the schedule of a run: its length, its batch sizes, and the pieces of its rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tplaunch.errors import Problem
from tplaunch.recipe.schema import LrSchedule, Piece, Recipe
from tplaunch.spec.course import Course
from tplaunch.spec.pieces import Curve, Part, before_last, spans

_JUMP = 10.0  # a rate that changes by more from one step to the next was not meant
_RATES, _DECAYS, _SIZES = "lr_schedule.pieces", "optimizer.weight_decay_schedule", "training.batch_schedule"


def length_problems(recipe: Recipe) -> Iterator[Problem]:
    """How long the run is, and its batch sizes: without them no step has a place."""
    training = recipe.training
    said = [key for key in ("steps", "tokens", "samples") if getattr(training, key)]
    if not said:
        yield Problem("has no length", fix="add steps: 1000, or tokens: 1B, or samples: 1M", key="training")
    elif "tokens" in said and "samples" in said:
        yield Problem("tokens and samples both say how long the run is", fix="keep one", key="training.samples")
    ramp, pieces = training.batch_ramp_up, training.batch_schedule
    if ramp is not None and (ramp.steps is None) == (ramp.over is None):
        fix = "steps: 100 at each size, or over: 1B tokens in all"
        yield Problem("needs either steps or over, to say how long it is", fix=fix, key="training.batch_ramp_up")
    if ramp is not None and pieces is not None:
        yield Problem("has no place beside batch_ramp_up", fix="remove one of them", key=_SIZES)
    for number, piece in enumerate(pieces or ()):
        if (piece.for_ is None) == (piece.until is None):
            fix = "for: how long, or until: where in the run it ends"
            yield Problem("needs either for or until", fix=fix, key=f"{_SIZES}[{number}]")
            return
    if "steps" in said and len(said) == 2 and training.steps != (steps := Course(recipe).steps):
        what = f"{training.steps} steps are not what {training.length} take, which is {steps}"
        yield Problem(what, fix=f"remove it, or {training.length.unit}", key="training.steps")


def schedule_problems(recipe: Recipe) -> Iterator[Problem]:
    """What else is wrong; its lengths are sound."""
    course = Course(recipe)
    yield from _size_problems(course)
    schedule, optimizer = recipe.lr_schedule, recipe.optimizer
    if schedule.pieces is None:
        yield from _shorthand_problems(course)
    else:
        yield from _unread(schedule)
        yield from _piece_problems(course, schedule.pieces, _RATES, optimizer.lr)
    if (pieces := optimizer.weight_decay_schedule) is not None:
        if optimizer.weight_decay:
            yield from _piece_problems(course, pieces, _DECAYS, optimizer.weight_decay)
        else:
            why = "its rates are those of weight_decay, which is 0"
            yield Problem("moves nothing", why, "weight_decay: the highest", key=_DECAYS)


def schedule_warnings(recipe: Recipe) -> Iterator[Problem]:
    """What is probably not meant in a schedule that is sound."""
    course, training = Course(recipe), recipe.training
    warmup = recipe.lr_schedule.warmup_steps
    if course.batches.reach(warmup) >= training.steps:
        length = warmup.amount if warmup.unit == "steps" else warmup
        yield Problem(
            f"all {training.steps} steps are warmup ({length}): lr never reaches its full value",
            key="lr_schedule.warmup_steps",
        )
    full = course.batches.blocks[-1].step
    if training.batch_ramp_up is not None and full >= training.steps:
        yield Problem(
            f"takes {full} steps, the run ends after {training.steps}: it never has its full batch",
            key="training.batch_ramp_up",
        )
    pieces = (recipe.lr_schedule.pieces, recipe.optimizer.weight_decay_schedule)
    stages = training.stages or ()
    follows = [steps.stop - 1 for stage, steps in zip(stages, course.stages, strict=False) if stage.lr is None]
    ends = (max(follows, default=0) if stages else course.steps), course.steps
    for key, said, curve, end in zip((_RATES, _DECAYS), pieces, (course.scheduled, course.decays), ends, strict=True):
        last = curve.parts[-1]
        if (
            said
            and end
            and last.last > course.steps
            and last.formula.kind not in ("constant", "warmup", "step", "inverse-sqrt")
        ):
            where = f"{key}[{len(curve.parts) - 1}]"
            other = "the run" if end == course.steps else "the last stage that follows it"
            what = f"ends at step {last.last}, {other} at step {end}, where the rate is "
            yield Problem(f"{what}{curve.at(end):.4g}, not {last.formula.to:g}", key=where)


def _size_problems(course: Course) -> Iterator[Problem]:
    """Sizes of the batch that no step has."""
    pieces = course.recipe.training.batch_schedule
    if pieces is None:
        return
    ends = course.batches.ends
    for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        key = f"{_SIZES}[{number}]"
        if end <= begin:
            yield no_step(begin, end, key)
        elif begin >= course.steps:
            yield beyond(begin, course.steps, key)
        elif end >= course.steps and number == len(pieces) - 1:
            what = f"ends with step {end}, the run with step {course.steps}: it never has its full batch"
            yield Problem(what, fix=f"global_batch_size: {pieces[number].size}, and leave this out", key=key)


def _shorthand_problems(course: Course) -> Iterator[Problem]:
    schedule, steps = course.recipe.lr_schedule, course.steps
    peak = course.recipe.optimizer.lr
    if schedule.min_lr > peak:
        yield Problem(f"min_lr {schedule.min_lr:g} is above lr {peak:g}", key="lr_schedule.min_lr")
    if schedule.decay_steps is None:
        return
    lasting, warm = schedule.decay_steps, course.batches.reach(schedule.warmup_steps)
    decay = int(lasting.amount) if lasting.unit == "steps" else steps - before_last(lasting, course.batches, steps)
    if warm + decay > steps:
        room = steps - warm
        yield Problem(
            f"warmup {warm} + decay {decay} steps exceed the run's {steps}",
            fix=f"decay_steps: at most {room}" if room > 0 else "fewer warmup_steps",
            key="lr_schedule.decay_steps",
        )


def _unread(schedule: LrSchedule) -> Iterator[Problem]:
    """Keys that say the same as pieces in another way."""
    for key in ("warmup_steps", "decay_steps", "min_lr"):
        if getattr(schedule, key):
            yield Problem(
                "has no place beside pieces", fix=f"remove it; a piece says it, or {key}: 0", key=f"lr_schedule.{key}"
            )


def _piece_problems(course: Course, pieces: Sequence[Piece], section: str, highest: float) -> Iterator[Problem]:
    """What is wrong with each piece by itself; then with their places; then with the rates."""
    found = [
        *(one for number, piece in enumerate(pieces) for one in piece_problems(piece, f"{section}[{number}]", highest)),
        *_without_length(pieces, section),
    ]
    found = found or [*_places(course, pieces, section)]
    yield from found or _rates(course.scheduled if section == _RATES else course.decays, section)


def piece_problems(piece: Piece, key: str, highest: float) -> Iterator[Problem]:
    """What is wrong with a piece by itself.

    Args:
        key: that says it.
        highest: rate.
    """
    kind = piece.kind
    if piece.for_ is not None and piece.until is not None:
        yield Problem("for and until both say where it ends", fix="keep one", key=f"{key}.until")
    for name in ("every", "factor"):
        there = getattr(piece, name) is not None
        if kind == "step" and not there:
            yield Problem(f"needs {name}", fix="such as every: 10%, factor: 0.5", key=key)
        elif kind != "step" and there:
            yield Problem(f"{kind} has no {name}", fix="remove it, or kind: step", key=f"{key}.{name}")
    if piece.to is not None and kind in ("constant", "step", "inverse-sqrt"):
        fix = "from: its rate" if kind == "constant" else "remove it: it ends where its shape leads"
        yield Problem(f"{kind} has no to", fix=fix, key=f"{key}.to")
    if kind == "exponential" and not piece.to:
        yield Problem("never falls to 0", fix="to: a rate above 0, or kind: linear", key=key)
    for name, rate in (("from", piece.from_), ("to", piece.to)):
        if rate is not None and rate > highest:
            base = "optimizer.weight_decay" if key.startswith(_DECAYS) else "optimizer.lr"
            yield Problem(
                f"{rate:g} is above {base} {highest:g}, the highest", fix=f"raise {base}", key=f"{key}.{name}"
            )


def _without_length(pieces: Sequence[Piece], section: str) -> Iterator[Problem]:
    first: int | None = None
    for number, piece in enumerate(pieces):
        key = f"{section}[{number}]"
        if first is not None and piece.for_ is None:
            where = "no length" if piece.until is None else "its end only"
            what = (
                f"says {where}, and neither does {section}[{first}] say how long it is: nothing tells where they meet"
            )
            yield Problem(what, fix="for: how long", key=key)
        elif piece.for_ is None and piece.until is None:
            first = number


def _places(course: Course, pieces: Sequence[Piece], section: str) -> Iterator[Problem]:
    """Gaps, overlaps, and pieces that have no step."""
    places = spans(pieces, course.batches, course.steps)
    for number, (begin, end) in enumerate(places):
        key = f"{section}[{number}]"
        if begin >= course.steps:
            yield beyond(begin, course.steps, key)
            return
        if end <= begin:
            yield no_step(begin, end, key)
            return
    if places[-1][1] < course.steps:
        what = f"the last piece ends with step {places[-1][1]}, the run with step {course.steps}"
        key = f"{section}[{len(pieces) - 1}]"
        yield Problem(what, fix="leave its length out, or add {kind: constant}", key=key)


def no_step(begin: int, end: int, key: str, part: str = "piece") -> Problem:
    """A part of the run that ends before it begins."""
    what = f"has no step: the {part} before ends with step {begin}, this one with step {end}"
    return Problem(what, fix=f"make it longer, or the {part}s before shorter", key=key)


def beyond(begin: int, steps: int, key: str) -> Problem:
    """A part of the run that begins when it has ended."""
    what = f"begins after step {begin}, the run ends with step {steps}"
    return Problem(what, fix="a longer run, or leave it out", key=key)


def _rates(curve: Curve, section: str) -> Iterator[Problem]:
    """Rates that jump, and shapes that cannot begin where they do."""
    for number, part in enumerate(curve.parts):
        key = f"{section}[{number}]"
        yield from shape_problems(part, key)
        if number:
            before, start = curve.at(part.first - 1), part.formula.start
            yield from jumps(before, start, part.first, f"from: {before:g}, or a piece that leads there", f"{key}.from")


def shape_problems(part: Part, key: str) -> Iterator[Problem]:
    """A shape that cannot begin where it does."""
    if part.formula.kind == "exponential" and not part.formula.start:
        yield Problem("begins at 0, where it would stay", fix="from: a rate above 0", key=key)
    if part.formula.kind == "inverse-sqrt" and part.first == 1:
        why = "it falls as the root of how far the run is"
        yield Problem("cannot begin the run", why, fix="a warmup before it", key=key)


def jumps(before: float, after: float, step: int, fix: str, key: str) -> Iterator[Problem]:
    """A rate that another one follows, at a step, which was not meant."""
    if before != after and max(before, after) > _JUMP * min(before, after):
        what = f"the rate jumps from {before:g} to {after:g} at step {step}, by more than {_JUMP:g} times"
        yield Problem(what, fix=fix, key=key)
