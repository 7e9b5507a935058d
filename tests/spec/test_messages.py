"""Where sends and receives stand: every rank's are a part of one sequence, in its order."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tplaunch.spec.messages import Message, Transfer, made, messages_held, needed, with_messages
from tplaunch.spec.orders import Action, actions_of
from tplaunch.spec.schedules import SCHEDULES

STAGES = {"gpipe": [1], "1f1b": [1], "interleaved1f1b": [2, 3], "interleavedzerobubble": [2], "zbvzerobubble": [2]}
CASES = [(name, v) for name, counts in {**STAGES, "dualpipev": [2]}.items() for v in counts]
SIZES = [(pp, m) for pp in (2, 3, 4, 8) for m in (1, 4, 6, 8, 16, 17, 40)]


def programs(schedule: str, pp: int, stages: int, microbatches: int) -> list[list[Action | Transfer]]:
    orders = [actions_of(schedule, rank, pp, stages, microbatches) for rank in range(pp)]
    found = with_messages(orders, schedule, pp * stages)
    assert [[item for item in program if isinstance(item, Action)] for program in found] == orders
    return found


@pytest.mark.parametrize(("schedule", "stages"), CASES)
def test_every_pass_has_what_it_needs(schedule: str, stages: int) -> None:
    checked = 0
    for pp, m in SIZES:
        if SCHEDULES[schedule].why_not(pp, stages, m):
            continue
        checked += 1
        last = pp * stages - 1
        for program in programs(schedule, pp, stages, m):
            there: set[Message] = set()
            for item in program:
                if isinstance(item, Transfer):
                    (there.add if item.way == "receive" else there.remove)(item.message)
                    continue
                if (need := needed(item, last)) is not None:
                    there.remove(need)
                if (message := made(item, last)) is not None:
                    there.add(message)
            assert not there
    assert checked >= 8


@pytest.mark.parametrize(("schedule", "stages"), CASES)
def test_no_two_ranks_wait_for_each_other(schedule: str, stages: int) -> None:
    """With messages that move one after the other on every rank, each when both its ends have come to it."""
    for pp, m in SIZES:
        if SCHEDULES[schedule].why_not(pp, stages, m):
            continue
        waiting = [
            [item for item in program if isinstance(item, Transfer)] for program in programs(schedule, pp, stages, m)
        ]
        heads, moved = [0] * pp, -1
        while moved:
            moved = 0
            for rank, transfers in enumerate(waiting):
                while heads[rank] < len(transfers):
                    mine = transfers[heads[rank]]
                    peer = waiting[mine.peer]
                    if heads[mine.peer] == len(peer) or peer[heads[mine.peer]].message != mine.message:
                        break
                    theirs = peer[heads[mine.peer]]
                    assert {mine.way, theirs.way} == {"send", "receive"} and theirs.peer == rank
                    heads[rank] += 1
                    heads[mine.peer] += 1
                    moved += 1
        assert heads == list(map(len, waiting)), f"{pp=} {m=}"


@pytest.mark.parametrize(("schedule", "stages"), CASES)
def test_no_two_ranks_exchange_messages_at_one_point(schedule: str, stages: int) -> None:
    """There is nothing to batch: where one of them sends and receives, the other has a pass between the two."""
    for pp in (2, 4, 8):
        pairs = [
            {
                frozenset((one.message, other.message))
                for one, other in pairwise(program)
                if isinstance(one, Transfer) and isinstance(other, Transfer) and one.way != other.way
            }
            for program in programs(schedule, pp, stages, 4 * pp)
        ]
        assert any(pairs)
        assert not any(ours & theirs for i, ours in enumerate(pairs) for theirs in pairs[:i])


def test_receives_are_posted_before_the_pass_ahead_of_theirs() -> None:
    """So that they come while that one runs: every input of the last rank of 1F1B, once the pipeline is full."""
    program = programs("1f1b", 4, 1, 16)[3]
    posted = {
        item.message.microbatch: i
        for i, item in enumerate(program)
        if isinstance(item, Transfer) and item.way == "receive"
    }
    begun = {item.microbatch: i for i, item in enumerate(program) if isinstance(item, Action) and item.kind == "F"}
    for before, now in pairwise(range(16)):
        assert begun[before] < posted[now] < program.index(Action("B", 3, before)) < begun[now]


@pytest.mark.parametrize(("schedule", "stages"), CASES)
def test_messages_held_do_not_grow_with_the_microbatches(schedule: str, stages: int) -> None:
    for pp in (2, 4, 8):
        few = messages_held(schedule, pp, stages, 4 * pp)
        assert messages_held(schedule, pp, stages, 64 * pp) == few
        assert max(few) <= 2 * stages + pp


def test_a_rank_alone_sends_nothing() -> None:
    for schedule in ("zbvzerobubble", "dualpipev"):
        assert not any(isinstance(item, Transfer) for item in programs(schedule, 1, 2, 4)[0])


def test_orders_that_wait_for_one_another_are_found() -> None:
    orders = [actions_of("1f1b", rank, 2, 1, 4) for rank in range(2)]
    orders[0].insert(0, orders[0].pop(2))  # rank 0 now wants microbatch 0's gradient before it sends it forward
    with pytest.raises(ValueError, match="deadlock: pipeline rank 0 waits for ever before 0B0"):
        with_messages(orders, "1f1b", 2)


def test_messages_in_words() -> None:
    assert str(Message("input gradient", 3, 1)) == "input gradient of stage 3, microbatch 1"
