"""Copies of state in host memory: training goes on while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tplaunch.torch_private import with_local


class HostCopies:
    """Copies tensors to host memory that is made at the first call, pinned for a GPU, and filled again at later ones.

    torch's own stager copies the whole storage of each tensor: of rows that lie in a flat buffer, those of all ranks.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors; those of the call before are overwritten.

        Args:
            tensors: by name, any dtype; of DTensors this rank's part is copied.
        """
        copies: dict[str, Tensor] = {}
        under_way = False
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if name not in self._kept:
                self._kept[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            kept = self._kept[name].copy_(local, non_blocking=True)
            under_way = under_way or local.is_cuda
            copies[name] = with_local(tensor, kept) if isinstance(tensor, DTensor) else kept
        if under_way:
            torch.cuda.synchronize()
        return copies
