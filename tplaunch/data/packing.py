"""Sequences packed whole into rows of one length: best fit, the longest first (Ding et al. 2024, arXiv 2404.10830), row
for row as TRL's `packing_strategy="bfd"` does.

A sequence goes to the row that it leaves least room in, of several the one that came to have that room first; where it
fits into none, it begins a row. Sequences of one length are placed together, so that work and memory grow with the
different lengths and not with the sequences.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

VERSION = 1  # raise it, and `mixture.ORDER`, when the same sequences would be in other rows


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


def count_rows(counts: Mapping[int, int], capacity: int) -> int:
    """The rows that sequences are packed into.

    Args:
        counts: sequences of each length, from 1 to `capacity`.
    """
    return sum(placed.rows for placed in _place(counts, capacity) if placed.room == capacity)


class Band(NamedTuple):
    """Rows that follow one another and hold sequences of the same lengths.

    Args:
        first: of the rows.
        stop: the row behind them.
        last: the portion that they took last.
    """

    first: int
    stop: int
    last: int


class Layout:
    """Which sequences each row holds, where these are numbered by length, the longest first.

    Of portion p, row r holds `each[p]` sequences, from number `base[p] + r * each[p]` on, behind what it holds of
    portion `before[p]`.

    Args:
        counts: sequences of each length, from 1 to `capacity`.
        capacity: tokens of a row.

    Attributes:
        rows: of all bands.
        bands: in the order of their rows.
        length: tokens of a sequence of each portion.
        each, base: as said above.
        before: the portion that the same rows took before; -1: none.
        held: sequences in a row, those of this portion included.
    """

    def __init__(self, counts: Mapping[int, int], capacity: int) -> None:
        self.rows = 0
        self.length, self.each, self.base, self.before, self.held = (array("q") for _ in range(5))
        having: dict[int, deque[Band]] = {}  # by room, in the order in which they came to have it
        number = 0
        for length, room, rows, each in _place(counts, capacity):
            if room == capacity:
                taken = [Band(self.rows, self.rows + rows, -1)]
                self.rows += rows
            else:
                taken = _take(having[room], rows)
            left = having.setdefault(room - each * length, deque())
            for first, stop, before in taken:
                left.append(Band(first, stop, len(self.length)))
                self.length.append(length)
                self.each.append(each)
                self.base.append(number - first * each)
                self.before.append(before)
                self.held.append(each + (self.held[before] if before >= 0 else 0))
                number += (stop - first) * each
        self.bands = sorted(band for waiting in having.values() for band in waiting)


def _take(waiting: deque[Band], rows: int) -> list[Band]:
    """The first `rows` rows, taken out."""
    found = []
    while rows:
        band = waiting.popleft()
        if band.stop - band.first > rows:
            middle = band.first + rows
            waiting.appendleft(band._replace(first=middle))
            band = band._replace(stop=middle)
        found.append(band)
        rows -= band.stop - band.first
    return found
