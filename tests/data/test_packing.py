"""Rows by best fit: nothing cut, nothing lost, and each sequence where the rule puts it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tplaunch.data.packing import count_rows, pack


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """The rule itself: each sequence, longest first, to the row that it leaves least room in."""
    rows: list[tuple[int, list[int]]] = []  # room, sequences; those first that have had their room for longest
    made: list[list[int]] = []
    for number in sorted((n for n, length in enumerate(lengths) if length), key=lambda n: -lengths[n]):
        fitting = [room for room, _ in rows if room >= lengths[number]]
        if fitting:
            at = next(at for at, (room, _) in enumerate(rows) if room == min(fitting))
            room, row = rows.pop(at)
        else:
            room, row = capacity, []
            made.append(row)
        row.append(number)
        rows.append((room - lengths[number], row))
    return made


@given(
    st.integers(1, 40).flatmap(lambda most: st.tuples(st.lists(st.integers(0, most), max_size=80), st.just(most))),
    st.integers(0, 30),
)
def test_each_sequence_goes_where_it_fits_best(given_: tuple[list[int], int], more: int) -> None:
    lengths, longest = given_
    capacity = longest + more
    rows = pack(np.array(lengths, np.int64), capacity)
    found = [rows[row].tolist() for row in range(len(rows))]
    assert found == one_by_one(lengths, capacity)
    assert count_rows(lengths, capacity) == len(rows)


def test_many_sequences_fill_rows() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.0, 1.0, 200_000).astype(np.int64) + 1, 1024)
    rows = pack(lengths, 1024)
    assert sorted(rows.sequences) == list(range(len(lengths)))
    held = np.add.reduceat(lengths[rows.sequences], rows.bounds[:-1])
    assert held.max() <= 1024 and lengths.sum() / (1024 * len(rows)) > 0.999
