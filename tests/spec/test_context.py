"""The pieces of a sequence that context-parallel ranks hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tplaunch.spec.context import piece_count, pieces

kinds = st.sampled_from(["allgather", "ulysses"])


@given(kinds, st.integers(1, 9), st.integers(1, 40))
def test_every_token_is_held_once(kind: str, cp: int, length: int) -> None:
    seq_len = length * piece_count(kind, cp)
    held = [[place for piece in pieces(kind, cp, rank, seq_len) for place in piece] for rank in range(cp)]
    assert sorted(place for places in held for place in places) == list(range(seq_len))
    assert {len(places) for places in held} == {seq_len // cp}
    assert all(places == sorted(places) for places in held)


@given(st.integers(1, 9), st.integers(1, 40))
def test_gathered_keys_are_the_same_work_for_every_rank(cp: int, length: int) -> None:
    """A query at place i looks at i + 1 keys."""
    work = [
        sum(place + 1 for piece in pieces("allgather", cp, rank, 2 * cp * length) for place in piece)
        for rank in range(cp)
    ]
    assert len(set(work)) == 1


def test_no_equal_pieces() -> None:
    with pytest.raises(ValueError, match="a sequence of 20 tokens has no 8 equal pieces"):
        pieces("allgather", 4, 0, 20)
