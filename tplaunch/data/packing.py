"""Sequences packed whole into rows of one length: best fit, the longest first (Ding et al. 2024, arXiv 2404.10830), row
for row as TRL's `packing_strategy="bfd"` does.

A sequence goes to the row that it leaves least room in, of several the one that came to have that room first; where it
fits into none, it begins a row. Sequences of one length are placed together, so that the work grows with the different
lengths and not with the sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Placed(NamedTuple):
    """Sequences of one length that were placed.

    Args:
        room: tokens free in their rows before; the capacity: the rows are new.
        rows: that take them, those first that have had the room for longest.
        each: sequences that each of these takes.
    """

    length: int
    room: int
    rows: int
    each: int


def _place(counts: Mapping[int, int], capacity: int) -> Iterator[_Placed]:
    """Place sequences by length, the longest first.

    Args:
        counts: sequences of each length, from 1 to `capacity`.
    """
    having: Counter[int] = Counter()  # rows by room
    rooms: list[int] = []  # that there are rows of, ascending
    for length in sorted(counts, reverse=True):
        waiting = counts[length]
        while waiting:
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            # Such a row takes all that it has room for: nothing else fits as well as what is left of it.
            each = min(room // length, waiting)
            rows = waiting // each if at == len(rooms) else min(waiting // each, having[room])
            yield _Placed(length, room, rows, each)
            waiting -= rows * each
            if at < len(rooms):
                having[room] -= rows
                if not having[room]:
                    del rooms[at]
            left = room - each * length
            if left and not having[left]:
                insort(rooms, left)
            having[left] += rows


def count_rows(lengths: Iterable[int], capacity: int) -> int:
    """The rows that `pack` makes; without numpy."""
    counts = Counter(lengths)
    counts.pop(0, None)
    return sum(placed.rows for placed in _place(counts, capacity) if placed.room == capacity)


@dataclass(frozen=True)
class Rows:
    """Which sequences each row holds.

    Attributes:
        sequences: their numbers, row after row, int64 [n].
        bounds: of row r: `sequences[bounds[r] : bounds[r + 1]]`; int64 [rows + 1].
    """

    sequences: NDArray
    bounds: NDArray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> NDArray:
        """The sequences of a row, in the order in which they stand there."""
        return self.sequences[self.bounds[row] : self.bounds[row + 1]]


def pack(lengths: NDArray, capacity: int) -> Rows:
    """Pack sequences into rows; a pure function.

    Args:
        lengths: tokens of each sequence, from 0 to `capacity`; those of 0 are in no row.
        capacity: tokens of a row.
    """
    import numpy as np

    lengths = np.asarray(lengths)
    kept = np.flatnonzero(lengths)
    by_length = kept[np.argsort(-lengths[kept].astype(np.int64), kind="stable")]
    values, numbers = np.unique(lengths[kept], return_counts=True)
    having: dict[int, deque[NDArray]] = {}  # rows by room, in the order in which they came to have it
    row_of = np.empty(len(by_length), np.int64)
    made = at = 0
    for length, room, rows, each in _place(dict(zip(values.tolist(), numbers.tolist(), strict=True)), capacity):
        if room == capacity:
            taken = np.arange(made, made + rows)
            made += rows
        else:
            taken = _take(having[room], rows)
        row_of[at : at + rows * each] = np.repeat(taken, each)
        at += rows * each
        having.setdefault(room - each * length, deque()).append(taken)
    by_row = np.argsort(row_of, kind="stable")
    bounds = np.zeros(made + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=made), out=bounds[1:])
    return Rows(by_length[by_row], bounds)


def _take(waiting: deque[NDArray], count: int) -> NDArray:
    """The first `count` numbers, taken out."""
    import numpy as np

    found = []
    while count:
        first = waiting.popleft()
        if len(first) > count:
            waiting.appendleft(first[count:])
        found.append(first[:count])
        count -= len(found[-1])
    return np.concatenate(found)
