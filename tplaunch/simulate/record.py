"""Records every collective, send and receive that one rank issues in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tplaunch.spec.messages import Transfer
from tplaunch.torch_private import CollectiveOp, OpOverload, tree_leaves
from tplaunch.train.exchange import Exchange

KINDS = {
    "all_reduce": "all-reduce",
    "allreduce_": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
}


@dataclass(frozen=True)
class Collective:
    """One collective.

    Args:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", or torch's name.
        group: its ranks.
        bytes: of the whole tensor, before or after it is split.
    """

    kind: str
    group: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Message:
    """One send or receive.

    Args:
        kind: "send" or "receive".
        peer: the other rank.
        bytes: of the tensor.
        what: which tensor, such as "output of stage 3, microbatch 0"; the same on both sides.
        batch: number of the call that began it; messages of one call go together, in any order.
    """

    kind: str
    peer: int
    bytes: int
    what: str
    batch: int


@dataclass
class Recorder:
    """Keeps what the operations of torch.distributed send; only while `active`."""

    active: bool = False
    collectives: list[Collective] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    _what: str = "set-up"  # the tensor that is sent or received now
    _batch: int = 0

    def record(self, func: OpOverload, args: tuple[Any, ...], result: Any) -> None:
        """Note one operation."""
        if not self.active:
            return
        group = CollectiveOp.get_process_group(func, args)
        name = func.name().partition("::")[2].split(".")[0]
        if name in ("send", "recv_"):
            self._message("send" if name == "send" else "receive", args[0][0], dist.get_global_rank(group, args[2]))
        else:
            sizes = (sum(t.nbytes for t in tree_leaves(side) if isinstance(t, Tensor)) for side in _sides(args, result))
            ranks = tuple(dist.get_process_group_ranks(group))
            self.collectives.append(Collective(KINDS.get(name, name), ranks, max(sizes)))

    def _message(self, kind: str, tensor: Tensor, peer: int) -> None:
        self._batch += 1
        self.messages.append(Message(kind, peer, tensor.nbytes, self._what, self._batch))

    @contextmanager
    def watching_pipeline(self) -> Iterator[None]:
        """Know which stage and microbatch a message belongs to."""
        with replaced(Exchange, "move", self._naming(Exchange.move)):
            yield

    def _naming(self, move: Callable[[Exchange, Transfer], None]) -> Callable[[Exchange, Transfer], None]:
        def named(exchange: Exchange, transfer: Transfer) -> None:
            self._what = str(transfer.message)
            move(exchange, transfer)

        return named


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _sides(args: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
    return (*args, result)
