"""The story of a run: its attempts, and what happened in them, each where it lies on the curves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from tplaunch.launch.console import in_words
from tplaunch.report.curves import Curves
from tplaunch.run.events import (
    AttemptBegan,
    AttemptEnded,
    BadNodes,
    Branched,
    Changed,
    CheckpointDamaged,
    CheckpointKept,
    Done,
    EpochBegan,
    Event,
    ExportFailed,
    Fault,
    Initialized,
    LossSpiked,
    Resumed,
    RolledBack,
    Saved,
    SaveFailed,
    Skipped,
    StageBegan,
    Started,
    Stopped,
    Straggled,
    Submitted,
)
from tplaunch.run.history import History
from tplaunch.run.records import is_step

Kind = Literal["attempt", "checkpoint", "loss", "fault", "straggler", "other"]


@dataclass
class Attempt:
    """One start of the ranks.

    Args:
        number: from 1.
        began, ended: unix seconds; None while it goes on, or where it ended without a word.
        step: that it went on from; 0: from the beginning.
        changes: dotted key -> [was, now], since the attempt before.
        why: how it ended, in words.
    """

    number: int
    began: float
    job: str = ""
    nodes: list[str] = field(default_factory=list)
    step: int = 0
    ended: float | None = None
    code: int | None = None
    why: str = ""
    changes: dict[str, list[Any]] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)


def attempts(history: History) -> list[Attempt]:
    """The attempts of a run, oldest first."""
    found: list[Attempt] = []
    changes: dict[str, list[Any]] = {}
    for event in history.events:
        match event:
            case Changed():
                changes |= {
                    key: pair for key, pair in event.changes.items() if isinstance(pair, list) and len(pair) == 2
                }
            case AttemptBegan():
                if found and not found[-1].why:
                    found[-1].why = "killed: it has left no word"
                found.append(Attempt(event.attempt, event.time, event.job, event.nodes, changes=changes))
                changes = {}
            case Resumed(step=step) if found:
                found[-1].step = step
            case Saved(step=step) if found:
                found[-1].checkpoints.append(step)
            case AttemptEnded() if found:
                found[-1].ended, found[-1].code, found[-1].why = event.time, event.code, event.why
    return found


def when(moment: float) -> str:
    """A time of a file as text."""
    try:
        return datetime.fromtimestamp(moment).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # no time that there is
        return "?"


@dataclass(frozen=True)
class Mark:
    """Something that happened, at a step of the curves."""

    step: float
    time: float
    kind: Kind
    text: str


def marks(history: History, curves: Curves) -> list[Mark]:
    """What happened in a run, oldest first. What has no step of its own stands at the last record before it."""
    times = [(record["time"], record["step"]) for record in curves.records if record.get("time") is not None]
    times.sort()
    begins, first = _begins(history), 0 if history.parent is None else history.parent.step
    found = []
    for event in history.events:
        if (kind := _kind(event)) is None:
            continue
        step = begins.get(id(event), getattr(event, "step", None))
        if step is None:
            index = bisect_right(times, (event.time, float("inf")))
            step = times[index - 1][1] if index else first
        if not is_step(step):
            continue
        found.append(Mark(step, event.time, kind, say(event)))
    return found


def _begins(history: History) -> dict[int, int]:
    """The steps from which attempts went on, by the identity of the events that began them."""
    found: dict[int, int] = {}
    latest = None
    for event in history.events:
        if isinstance(event, AttemptBegan):
            latest = event
        elif isinstance(event, Resumed) and latest is not None:
            found[id(latest)] = event.step
    return found


def _kind(event: Event) -> Kind | None:
    match event:
        case AttemptBegan():
            return "attempt"
        case Saved():
            return "checkpoint"
        case LossSpiked() | Skipped() | RolledBack():
            return "loss"
        case AttemptEnded(code=code):
            return "fault" if code == 1 else "other"
        case Fault() | SaveFailed() | ExportFailed() | CheckpointDamaged() | BadNodes():
            return "fault"
        case Straggled():
            return "straggler"
        case Changed() | Submitted() | Branched() | Initialized() | Resumed() | StageBegan():
            return "other"
        case Done() | Stopped() | EpochBegan() | CheckpointKept():
            return "other"
    return None


def say(event: Event) -> str:
    """An event in words: as a launch says it, where it does."""
    if text := in_words(event):
        return text
    match event:
        case AttemptBegan(attempt=attempt, job=job, nodes=nodes):
            where = f" on {', '.join(map(str, nodes))}" if nodes else ""
            return f"attempt {attempt} began{f' in job {job}' if job else ''}{where}"
        case AttemptEnded(attempt=attempt, why=why):
            return f"attempt {attempt} ended: {why}"
        case BadNodes(nodes=nodes):
            return f"bad nodes: {', '.join(map(str, nodes))}"
        case Changed(changes=changes):
            return f"changed: {', '.join(changes)}"
        case Submitted(jobs=jobs):
            return f"submitted as {', '.join(map(str, jobs))}"
        case Started(world_size=size):
            return f"{size} ranks have met"
        case Initialized(path=path, of_step=step):
            return f"weights of {path}{'' if step is None else f', step {step}'}"
        case Branched(step=step, parent=parent):
            return f"branched from step {step} of {parent}"
        case Fault(kind=kind, step=step, rank=rank):
            return f"fault at step {step}: {kind}{'' if rank is None else f' on rank {rank}'}"
        case Stopped(step=step, by=by):
            return f"stopped after step {step}{f' by {by}' if by else ''}"
        case Done(step=step):
            return f"done: step {step}"
    return event.name


def gathered(found: Sequence[Mark]) -> Iterator[Mark]:
    """Marks with checkpoints in a row as one, so that a run of weeks fits a page."""
    row: list[Mark] = []
    for mark in [*found, None]:
        if mark is not None and mark.kind == "checkpoint":
            row.append(mark)
            continue
        if len(row) > 2:
            text = f"{len(row)} checkpoints, of steps {row[0].step:,.0f} to {row[-1].step:,.0f}"
            yield Mark(row[-1].step, row[-1].time, "checkpoint", text)
        else:
            yield from row
        row = []
        if mark is not None:
            yield mark
