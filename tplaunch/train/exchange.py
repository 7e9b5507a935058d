"""What a rank's pipeline stages pass to each other and to other ranks' in one step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.spec.messages import Message, Transfer, What


class Exchange:
    """Holds each message from the moment it is made, or its receive is posted, until it is taken or sent.

    Sends and receives are asynchronous, one operation each, in the order of `with_messages`: no two ranks ever wait for
    each other, and at no point have both something to send to the other, so that there is nothing to batch. None is
    reused or freed while it is under way: a receive is waited for where it is taken, a send when the next one of its
    kind begins. On a GPU the stream waits, not the host, and what is freed then is freed in that stream's order.

    Args:
        group: this rank's pipeline.
        like: a message's shape and dtype, on the meta device.
        device: where messages lie.
    """

    def __init__(self, group: dist.ProcessGroup, like: Tensor, device: torch.device) -> None:
        self.group, self.like, self.device = group, like, device
        self._there: dict[Message, tuple[Tensor, dist.Work | None]] = {}
        self._leaving: dict[What, tuple[Tensor, dist.Work]] = {}

    def put(self, message: Message, tensor: Tensor) -> None:
        """Give a message that was made here."""
        self._there[message] = tensor, None

    def take(self, message: Message) -> Tensor:
        """A message, when it is there."""
        tensor, work = self._there.pop(message)
        if work is not None:
            work.wait()
        return tensor

    def move(self, transfer: Transfer) -> None:
        """Begin a send or a receive."""
        message = transfer.message
        if transfer.way == "receive":
            tensor = torch.empty_like(self.like, device=self.device)
            self._there[message] = tensor, _work(dist.irecv(tensor, group=self.group, group_src=transfer.peer))
            return
        tensor, _ = self._there.pop(message)
        self._let_go(message.what)
        work = _work(dist.isend(tensor, group=self.group, group_dst=transfer.peer))
        self._leaving[message.what] = tensor, work

    def finish(self) -> None:
        """Wait for what is still being sent."""
        for what in list(self._leaving):
            self._let_go(what)

    def _let_go(self, what: What) -> None:
        """Wait for the last send of a kind."""
        if what in self._leaving:
            self._leaving.pop(what)[1].wait()


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is no part of its own pipeline"
    return work
