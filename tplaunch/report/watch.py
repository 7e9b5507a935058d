"""Runs while they go on: what is new in their files, read as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tplaunch.files import Record, Tail
from tplaunch.report.rows import Row, rows_of
from tplaunch.run.directory import RunDir
from tplaunch.run.records import is_number, parse_records

POLL_S = 1.0  # between looks at the files
STATES_S = 10.0  # between questions how the runs stand, which may be put to a cluster's controller
GOES_ON = frozenset(("running", "pending", "requeued", "stopping", "configuring", "suspended"))
_KEPT = 4000  # losses of a run


@dataclass
class Watched:
    """A run that is watched.

    Args:
        row: how it stands.
        losses: of its newest records.
        new: records since the last look.
    """

    run: RunDir
    row: Row
    tail: Tail
    losses: list[float] = field(default_factory=list)
    last: Record = field(default_factory=dict)
    new: list[Record] = field(default_factory=list)

    def read(self) -> None:
        """Take in what is new. A file that was replaced is a run that went on from an earlier step."""
        before = self.last.get("step", -1)
        records = parse_records(self.tail.read(whole_lines=True))[0]
        if records and records[0]["step"] <= before:
            self.losses.clear()
        self.losses += [record["loss"] for record in records if is_number(record.get("loss"))]
        del self.losses[:-_KEPT]
        newest = self.last.get("time") or 0
        self.new = [record for record in records if (record.get("time") or 0) > newest]
        if not self.last:  # the first look: what was before is not news, but for where it stands
            self.new = self.new[-1:]
        for record in records:
            self.last = {**self.last, **record}

    @property
    def seconds_left(self) -> float | None:
        """Until its last step, at the present speed."""
        step, seconds, steps = self.last.get("step"), self.last.get("step_time_s"), self.row.steps
        if self.row.state != "running" or step is None or seconds is None or steps is None:
            return None
        return float((steps - step) * seconds)


def watch(runs: Sequence[RunDir], show: Callable[[list[Watched]], None]) -> None:
    """Show runs again and again, until none of them goes on any more.

    Args:
        show: called after each look.
    """
    watched: list[Watched] = []
    asked = 0.0
    while True:
        if not watched or time.monotonic() - asked >= STATES_S:
            rows = rows_of(runs, runs[0].root.parent)[0]
            if not watched:
                watched = [Watched(run, row, Tail(run.metrics)) for run, row in zip(runs, rows, strict=True)]
            for one, row in zip(watched, rows, strict=True):
                one.row = row
            asked = time.monotonic()
        for one in watched:
            one.read()
        show(watched)
        if not any(one.row.state in GOES_ON for one in watched):
            return
        time.sleep(POLL_S)
