"""Records every collective, send and receive that one rank issues in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from tplaunch.torch_private import CollectiveOp, OpOverload, storage_id, tree_leaves

KINDS = {
    "all_reduce": "all-reduce",
    "allreduce_": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
}


@dataclass(frozen=True)
class Collective:
    """One collective.

    Args:
        kind: "all-reduce", "all-gather", "reduce-scatter", or torch's name.
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
    _names: dict[int, str] = field(default_factory=dict)  # storage -> what it holds
    _batch: int = 0
    _in_batch: bool = False

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
        if not self._in_batch:
            self._batch += 1
        what = self._names.get(storage_id(tensor), "set-up")
        self.messages.append(Message(kind, peer, tensor.nbytes, what, self._batch))

    @contextmanager
    def watching_pipeline(self) -> Iterator[None]:
        """Know which stage and microbatch a message belongs to, and which go together."""
        with ExitStack() as stack:
            for method, tensor, shift in _TENSORS_OF:
                naming = self._naming(getattr(PipelineStage, method), tensor, shift)
                stack.enter_context(replaced(PipelineStage, method, naming))
            together = self._together(dist.batch_isend_irecv)
            stack.enter_context(replaced(dist, "batch_isend_irecv", together))
            yield

    def _naming(self, method: Callable[..., Any], tensor: str, shift: int) -> Callable[..., Any]:
        def named(stage: PipelineStage, microbatch: int) -> Any:
            operations = method(stage, microbatch)
            for operation in operations:
                what = f"{tensor} of stage {stage.stage_index + shift}, microbatch {microbatch}"
                self._names[storage_id(operation.tensor)] = what
            return operations

        return named

    def _together(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def grouped(operations: Any) -> Any:
            self._batch += 1
            self._in_batch = True
            try:
                return function(operations)
            finally:
                self._in_batch = False

        return grouped


# Which tensor a pipeline stage's messages hold: by its method, and the stage that computed it (this, or the next one).
_TENSORS_OF = (
    ("get_fwd_recv_ops", "output", -1),
    ("get_fwd_send_ops", "output", 0),
    ("get_bwd_recv_ops", "input gradient", 1),
    ("get_bwd_send_ops", "input gradient", 0),
)


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
