"""Checks that the recorded sends, receives and collectives match, so that a deadlock is found before launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest

from tplaunch.simulate.record import Collective, Message

_MIRROR = {"send": "receive", "receive": "send"}


def deadlock(messages: Mapping[int, Sequence[Message]]) -> str | None:
    """Deliver the messages of all ranks of a pipeline to each other, none of them before both sides are there.

    That is how NCCL runs them: a batch of sends and receives begins when the one before it has ended, and a message
    moves when both ranks have come to it.

    Args:
        messages: of every rank of a pipeline, in order.

    Returns:
        None when every message arrives; else which ranks wait for what.
    """
    batches = {
        rank: [list(batch) for _, batch in groupby(said, key=lambda message: message.batch)]
        for rank, said in messages.items()
    }
    at = dict.fromkeys(batches, 0)
    open_ = {rank: list(found[0]) if found else [] for rank, found in batches.items()}
    moving = list(batches)
    while moving:
        rank = moving.pop()
        for message in list(open_[rank]):
            mirror = _find(open_.get(message.peer, []), rank, message)
            if mirror is None:
                continue
            open_[rank].remove(message)
            open_[message.peer].remove(mirror)
            for side in (rank, message.peer):
                if not open_[side] and at[side] + 1 < len(batches[side]):
                    at[side] += 1
                    open_[side] = list(batches[side][at[side]])
                    moving.append(side)
            if rank in moving:
                break
    stuck = [f"rank {rank} waits to {said(open_[rank][0])}" for rank in sorted(open_) if open_[rank]]
    return "; ".join(stuck) or None


def _find(messages: Sequence[Message], sender: int, message: Message) -> Message | None:
    wanted = (_MIRROR[message.kind], sender, message.bytes, message.what)
    return next((m for m in messages if (m.kind, m.peer, m.bytes, m.what) == wanted), None)


def said(message: Message) -> str:
    """A message in words."""
    way = "to" if message.kind == "send" else "from"
    return f"{message.kind} the {message.what} ({message.bytes} bytes) {way} rank {message.peer}"


def differing_collective(
    first: int, of_first: Sequence[Collective], second: int, of_second: Sequence[Collective]
) -> str | None:
    """The first collective of the groups that two ranks share in which they do not do the same."""
    shared = {c.group for c in of_first if second in c.group} | {c.group for c in of_second if first in c.group}
    for group in sorted(shared):
        pairs = zip_longest((c for c in of_first if c.group == group), (c for c in of_second if c.group == group))
        for number, (ours, theirs) in enumerate(pairs, 1):
            # Of an all-to-all, each rank holds what it holds.
            uneven = ours and theirs and ours.kind == theirs.kind == "all-to-all"
            if ours != theirs and not uneven:
                words = [f"{c.kind} of {c.bytes} bytes" if c else "nothing more" for c in (ours, theirs)]
                return (
                    f"collective {number} of their group of {len(group)}: "
                    f"rank {first} {words[0]}, rank {second} {words[1]}"
                )
    return None
