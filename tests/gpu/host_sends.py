"""Sends between pipeline stages on one GPU: gloo's cannot read a GPU's memory, so they go through the host's.

For tests alone: with a GPU each, stages send over NCCL.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

_isend, _irecv = dist.isend, dist.irecv


class _Landing:
    """A receive whose wait ends with the copy to the GPU."""

    def __init__(self, work: Any, host: Tensor, tensor: Tensor) -> None:
        self.work, self.host, self.tensor = work, host, tensor

    def wait(self) -> None:
        self.work.wait()
        self.tensor.data.copy_(self.host)  # as gloo would: autograd is not told


class _Leaving:
    """A send that keeps the copy that it is sent from."""

    def __init__(self, work: Any, host: Tensor) -> None:
        self.work, self.host = work, host

    def wait(self) -> None:
        self.work.wait()


def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    host = tensor.detach().to("cpu", copy=True)
    return _Leaving(_isend(host, *args, **kwargs), host)


def irecv(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    host = torch.empty_like(tensor, device="cpu")
    return _Landing(_irecv(host, *args, **kwargs), host, tensor)


def install() -> None:
    """Take the place of torch's functions in this process."""
    for module in (dist, c10d):
        module.isend, module.irecv = isend, irecv  # type: ignore[attr-defined]
