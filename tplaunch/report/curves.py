"""A run's curves: its metrics records, as points; thinned to what a picture can show."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tplaunch.files import Record
from tplaunch.report.family import ancestors
from tplaunch.run.directory import RunDir
from tplaunch.run.records import is_number, read_records

Point = tuple[float, float]


@dataclass(frozen=True)
class Curves:
    """What a run measured.

    Args:
        records: one of each logged step, in the order of steps.
        bad: lines of the file that are none.
        before: of a branch, those of the runs that it goes on from, each up to where it left it.
    """

    records: Sequence[Record]
    bad: int = 0
    before: Sequence[Record] = ()

    @classmethod
    def of(cls, run: RunDir) -> Curves:
        """Read a run's records."""
        records, bad = read_records(run.metrics)
        return cls(_in_order(records), bad, _before(run))

    def points(self, key: str, x: str = "step") -> list[Point]:
        """(x, value) of a metric where both are numbers, from left to right."""
        return _points(self.records, key, x)

    def line(self, key: str, x: str = "step") -> list[Point]:
        """The same, of a branch from where its first run began."""
        return _points([*self.before, *self.records], key, x)

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next((r[key] for r in reversed(self.records) if is_number(r.get(key))), None)

    def typical(self, key: str) -> float | None:
        """The median of a metric, without the first record, which pays for set-up."""
        values = [value for _, value in self.points(key)]
        return median(values[1:] or values) if values else None

    def peak(self, key: str) -> float | None:
        """The largest value of a metric."""
        return max((value for _, value in self.points(key)), default=None)

    def best(self, key: str) -> Point | None:
        """(step, value) where a metric was smallest."""
        return min(self.points(key), key=lambda point: point[1], default=None)

    def at(self, key: str, x: float, along: str = "step") -> float | None:
        """A metric's newest value at or before a place of the x-axis."""
        points = self.line(key, along)
        index = bisect_right(points, (x, float("inf")))
        return points[index - 1][1] if index else None

    def metrics(self) -> set[str]:
        """The metrics that there are."""
        return {key for record in self.records for key, value in record.items() if is_number(value)}


def _in_order(records: Sequence[Record]) -> list[Record]:
    """One record of each step, in their order."""
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def _points(records: Sequence[Record], key: str, x: str) -> list[Point]:
    found = [(r[x], r[key]) for r in records if is_number(r.get(x)) and is_number(r.get(key))]
    return found if x == "step" else sorted(found)


def _before(run: RunDir) -> list[Record]:
    """The records of the runs that a run goes on from."""
    found: list[Record] = []
    for parent, step in ancestors(run):
        found = [record for record in _in_order(read_records(parent.metrics)[0]) if record["step"] <= step] + found
    return found


def thin(points: Sequence[Point], columns: int) -> list[Point]:
    """The points that a picture of so many pixel columns shows: of each column the first, lowest, highest and last (M4
    of Jugel et al., VLDB 2014), so that no spike is lost.

    Args:
        points: from left to right.
    """
    if len(points) <= 4 * columns:
        return list(points)
    left, right = points[0][0], points[-1][0]
    width = (right - left) / columns or 1.0
    found: list[Point] = []
    start = 0
    while start < len(points):
        column = int((points[start][0] - left) / width)
        stop = start + 1
        while stop < len(points) and int((points[stop][0] - left) / width) == column:
            stop += 1
        inside = range(start, stop)
        low, high = min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])
        found += [points[i] for i in sorted({start, low, high, stop - 1})]
        start = stop
    return found


def running_medians(values: Sequence[float], window: int) -> list[float]:
    """The median of the values around each: a curve without noise that neither lags, as an average of what came before
    does, nor bends towards spikes.

    Args:
        window: how many values, at least one; fewer at the ends, where the value stays in their middle.
    """
    reach = window // 2
    found, inside, first, stop = [], list[float](), 0, 0
    for i in range(len(values)):
        own = min(reach, i, len(values) - 1 - i)
        while stop <= i + own:
            insort(inside, values[stop])
            stop += 1
        while stop > i + own + 1:
            stop -= 1
            del inside[bisect_left(inside, values[stop])]
        while first < i - own:
            del inside[bisect_left(inside, values[first])]
            first += 1
        found.append(inside[len(inside) // 2])
    return found
