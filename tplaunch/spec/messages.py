"""Where the sends and receives of a pipeline schedule stand among each rank's passes (`spec.orders`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, NamedTuple

from tplaunch.spec.orders import Action, actions_of
from tplaunch.spec.schedules import stage_rank

What = Literal["output", "input gradient"]


class Message(NamedTuple):
    """What one stage computes of a microbatch for another: its output for the next stage, or its input's gradient for
    the stage before."""

    what: What
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.what} of stage {self.stage}, microbatch {self.microbatch}"


class Transfer(NamedTuple):
    """One end of a message between two ranks.

    Args:
        way: which end.
        message: what is sent.
        peer: the pipeline rank at the other end.
    """

    way: Literal["send", "receive"]
    message: Message
    peer: int


def needed(action: Action, last: int) -> Message | None:
    """What must have come from another stage before a pass begins; None: nothing, or the rank has it already.

    Args:
        last: number of the last stage.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return Message("output", stage - 1, microbatch) if stage > 0 else None
    if kind == "W" or stage == last:
        return None
    return Message("input gradient", stage + 1, microbatch)


def made(action: Action, last: int) -> Message | None:
    """What a pass makes for another stage; None: nothing.

    Args:
        last: number of the last stage.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return Message("output", stage, microbatch) if stage < last else None
    return Message("input gradient", stage, microbatch) if kind != "W" and stage > 0 else None


def with_messages(orders: Sequence[Sequence[Action]], schedule: str, num_stages: int) -> list[list[Action | Transfer]]:
    """Each rank's passes with its sends and receives among them.

    All ranks' passes are put into one sequence: in turn each rank does one, if it has what that needs. A message is
    sent where the pass that makes it ends, and its receive is posted at that moment of the sequence: early enough to
    come while the passes before the one that needs it run, and not before its sender is about to send it. (So does
    torch's `_PipelineScheduleRuntime`.)

    So each rank's sends and receives are a part of one sequence of messages, in its order. The first of them that has
    not moved can always move: both ends have done all that stands before it. No two ranks ever wait for each other,
    even where every send waits for its receive and a rank moves one message after the other, as NCCL does.

    Args:
        orders: of all ranks (`actions_of`).

    Raises:
        ValueError: the orders wait for one another for ever.
    """
    pp, last = len(orders), num_stages - 1
    home = [stage_rank(stage, pp, schedule) for stage in range(num_stages)]
    found: list[list[Action | Transfer]] = [[] for _ in orders]
    there: list[set[Message]] = [set() for _ in orders]  # what each rank has, and has not used yet
    at = [0] * pp
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            if at[rank] == len(order):
                continue
            action = order[at[rank]]
            need = needed(action, last)
            if need is not None:
                if need not in there[rank]:
                    continue
                there[rank].remove(need)
            found[rank].append(action)
            at[rank] += 1
            left -= 1
            message = made(action, last)
            if message is None:
                continue
            peer = home[message.stage + (1 if message.what == "output" else -1)]
            there[peer].add(message)
            if peer != rank:
                found[rank].append(Transfer("send", message, peer))
                found[peer].append(Transfer("receive", message, rank))
        if left == before:
            stuck = next(rank for rank, order in enumerate(orders) if at[rank] < len(order))
            raise ValueError(f"deadlock: pipeline rank {stuck} waits for ever before {orders[stuck][at[stuck]]}")
    return found


@cache
def messages_held(schedule: str, pp: int, virtual_stages: int, microbatches: int) -> list[int]:
    """By pipeline rank, the most messages that it holds while a backward pass runs, besides the inputs of microbatches
    in flight: inputs that have come early, gradients from their receive to the end of the backward pass that they
    begin, and of each kind the last that was sent.

    Their number does not depend on that of the microbatches, once the pipeline is full: that of a few rounds is told.
    """
    rounds = max(1, microbatches // pp)
    few = microbatches if rounds <= _ROUNDS else _ROUNDS * (microbatches // rounds)
    orders = [actions_of(schedule, rank, pp, virtual_stages, few) for rank in range(pp)]
    last = pp * virtual_stages - 1
    return [_most_held(program, last) for program in with_messages(orders, schedule, last + 1)]


_ROUNDS = 3  # of about pp microbatches


def _most_held(program: Iterable[Action | Transfer], last: int) -> int:
    there = kept = most = 0  # kept: gradients that the first stage leaves to the second half of its backward pass
    sent: set[What] = set()
    for item in program:
        if isinstance(item, Transfer):
            there += 1 if item.way == "receive" else -1
            if item.way == "send":
                sent.add(item.message.what)
            continue
        used = needed(item, last) is not None
        there -= used
        if item.kind != "F":
            most = max(most, there + kept + len(sent) + used)
        if item.stage == 0 and item.kind in "IW":
            kept += 1 if item.kind == "I" else -1
        there += made(item, last) is not None
    return most
