"""Rows by best fit: nothing cut, nothing lost, and each sequence where the rule puts it."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tplaunch.data.packing import Layout, count_rows


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


def laid_out(lengths: list[int], capacity: int) -> list[list[int]]:
    """The sequences of each row, as a layout says."""
    by_length = sorted((n for n, length in enumerate(lengths) if length), key=lambda n: -lengths[n])
    layout = Layout(Counter(filter(None, lengths)), capacity)
    rows: list[list[int]] = []
    for band in layout.bands:
        assert band.first == len(rows)
        for row in range(band.first, band.stop):
            held: list[int] = []
            portion = band.last
            while portion >= 0:
                number = layout.base[portion] + row * layout.each[portion]
                assert layout.held[band.last] - len(held) == layout.held[portion]
                held = by_length[number : number + layout.each[portion]] + held
                assert lengths[held[0]] == layout.length[portion]
                portion = layout.before[portion]
            rows.append(held)
    assert len(rows) == layout.rows
    return rows


@given(
    st.integers(1, 40).flatmap(lambda most: st.tuples(st.lists(st.integers(0, most), max_size=80), st.just(most))),
    st.integers(0, 30),
)
def test_each_sequence_goes_where_it_fits_best(given_: tuple[list[int], int], more: int) -> None:
    lengths, longest = given_
    capacity = longest + more
    rows = laid_out(lengths, capacity)
    assert rows == one_by_one(lengths, capacity)
    assert count_rows(Counter(filter(None, lengths)), capacity) == len(rows)


def test_many_sequences_fill_rows_and_take_no_more_memory() -> None:
    random, portions = np.random.default_rng(0), []
    for count in (200_000, 800_000):
        lengths = np.minimum(random.lognormal(5.0, 1.0, count).astype(np.int64) + 1, 1024)
        layout = Layout(Counter(lengths.tolist()), 1024)
        held = [(band.stop - band.first) * layout.held[band.last] for band in layout.bands]
        assert sum(held) == count
        assert lengths.sum() / (1024 * layout.rows) > 0.999
        portions.append(len(layout.length))
    assert portions[1] < 1.3 * portions[0]
