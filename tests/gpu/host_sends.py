"""What gloo cannot do on one GPU that ranks share goes through the host's memory: sends between pipeline stages, and
the gathers of sequence parallelism, at whose results torch 2.11 crashes.

For tests alone: with a GPU each, ranks meet over NCCL.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from tplaunch.parallel import collectives
from tplaunch.torch_private import collective_ops

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


def _on_host(operation: Any) -> Any:
    """A functional collective whose result [...] is there at once."""

    def run(x: Tensor, *args: Any) -> Tensor:
        done = collective_ops.wait_tensor.default(operation.default(x.cpu(), *args))
        return done.to(x.device) if x.is_cuda else done

    return SimpleNamespace(default=run)


def install() -> None:
    """Take the place of torch's functions in this process."""
    for module in (dist, c10d):
        module.isend, module.irecv = isend, irecv  # type: ignore[attr-defined]
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    there = {name: getattr(collective_ops, name) for name in ("all_reduce", "wait_tensor")}
    collectives.collective_ops = SimpleNamespace(
        **there, **{name: _on_host(getattr(collective_ops, name)) for name in names}
    )
