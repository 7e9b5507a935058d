"""Runs as rows of a table: how each stands, by its directory, its events and Slurm; sorted and chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tplaunch.errors import TplaunchError
from tplaunch.files import parse_lines
from tplaunch.recipe.outline import Outline, outline
from tplaunch.run.directory import RunDir
from tplaunch.run.events import DataRead, EpochBegan, Saved, Skipped, Straggled, parse_event
from tplaunch.run.history import History
from tplaunch.run.records import read_last
from tplaunch.slurm import client
from tplaunch.slurm.runs import Stand, stand_of
from tplaunch.units import format_duration

# How lines of events begin that come again and again (`files.to_line` writes them so).
_ROUTINE = tuple(f'{{"event": "{kind.name}"'.encode() for kind in (Saved, Straggled, Skipped, EpochBegan, DataRead))
SILENT_S = 300.0  # after which a run that holds its directory is called silent
_AXES = ("tp", "cp", "pp", "dp", "ep")


@dataclass(frozen=True)
class Row:
    """A run, in a line. What is not known is None.

    Args:
        run: the directory.
        name: its path below the folder that is listed.
        state: as `tplaunch status` calls it (`slurm.runs.RunStatus`), and preempted.
        steps: that it will have.
        topology: such as "tp2 pp2 dp2".
        age: seconds since it began.
        updated: seconds since its last record.
        metrics: the newest value of each.
        recipe: the values of its recipe by dotted key.
        parent: directory of the run that it branched from.
        parent_step: the step of that run.
    """

    run: Path
    name: str
    state: str
    job: str
    attempt: int
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    topology: str
    age: float | None
    updated: float | None
    why: str
    metrics: Mapping[str, Any] = field(repr=False)
    recipe: Outline = field(repr=False)
    parent: str | None = None
    parent_step: int | None = None

    @property
    def origin(self) -> str:
        """Where it branched from, `RUN@STEP`; "" where it began by itself."""
        return "" if self.parent is None else f"{Path(self.parent).name}@{self.parent_step}"

    def value(self, key: str) -> Any:
        """A figure of the run, a metric or a recipe's value, by its name; None where it has none."""
        if key in _OWN:
            return getattr(self, key)
        return self.metrics.get(key, self.recipe.get(key))

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for --json."""
        return {**asdict(self), "run": str(self.run)}


_OWN = frozenset(Row.__dataclass_fields__) - {"metrics", "recipe"}


def rows_of(runs: Sequence[RunDir], folder: Path) -> tuple[list[Row], str]:
    """A row for each run.

    Args:
        folder: what names are relative to.

    Returns:
        The rows, in order; and why Slurm could not be asked about their jobs, where it could not.
    """
    histories = [short_history(run) for run in runs]
    jobs, trouble = _jobs(histories)
    now = time.time()
    return [_row(run, history, jobs, folder, now) for run, history in zip(runs, histories, strict=True)], trouble


def short_history(run: RunDir) -> History:
    """A run's events without those that say nothing of how it stands, of which a run of weeks has thousands; of its
    checkpoints the newest."""
    try:
        lines = run.events.read_bytes().splitlines()
    except OSError:
        return History([])
    newest = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith(_ROUTINE[0])), None)
    kept = [line for i, line in enumerate(lines) if i == newest or not line.startswith(_ROUTINE)]
    events = (parse_event(record) for record in parse_lines(b"\n".join(kept)))
    return History([event for event in events if event is not None])


def _jobs(histories: Sequence[History]) -> tuple[dict[str, client.Standing], str]:
    try:
        return client.find_jobs([str(job) for history in histories for job in history.submitted_jobs]), ""
    except TplaunchError as error:  # a list of what is on a disk needs no cluster
        return {}, error.problems[0].what


def _row(run: RunDir, history: History, jobs: Mapping[str, client.Standing], folder: Path, now: float) -> Row:
    last = read_last(run.metrics)
    values = read_outline(run)
    stand = stand_of(run, history, jobs)
    state, why = _in_words(run, stand, now)
    steps = values.get("training.steps")
    times = [event.time for event in history.events[:1]]
    return Row(
        run=run.root,
        name=name_in(run, folder),
        state=state,
        job=stand.job,
        attempt=stand.attempt,
        step=last.get("step"),
        steps=steps if isinstance(steps, int) else None,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        topology=topology_words(values),
        age=now - times[0] if times else None,
        updated=now - last["time"] if last.get("time") is not None else None,
        why=why,
        metrics=last,
        recipe=values,
        parent=None if history.parent is None else history.parent.parent,
        parent_step=None if history.parent is None else history.parent.step,
    )


def name_in(run: RunDir, folder: Path) -> str:
    """What a run is called in a folder: its path below it."""
    below = run.root != folder and run.root.is_relative_to(folder)
    return str(run.root.relative_to(folder)) if below else run.root.absolute().name


def _in_words(run: RunDir, stand: Stand, now: float) -> tuple[str, str]:
    """State and why: also what a scheduler's word does not tell."""
    if stand.state == "stopped" and "preempted" in stand.why:
        return "preempted", stand.why
    if stand.state == "running" and not stand.why:
        beat = run.last_beat()
        if beat is not None and now - beat > SILENT_S:
            return "running", f"no sign of life for {format_duration(now - beat)}"
    return stand.state, stand.why


def read_outline(run: RunDir) -> Outline:
    """The values of a run's recipe by dotted key; {} where it cannot be read."""
    try:
        return outline(run.recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def topology_words(values: Outline) -> str:
    """The axes of a recipe's topology that are not 1; the world of one rank is tp1."""
    sizes = [(axis, values.get(f"topology.{axis}")) for axis in _AXES]
    shown = [f"{axis}{size}" for axis, size in sizes if size not in (None, 1)]
    return " ".join(shown) or ("tp1" if values else "")
