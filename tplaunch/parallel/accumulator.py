"""Weight gradients that are added up in place (Megatron's gradient accumulation fusion)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tplaunch.kernels.matmul import add_over_tokens, matmul
from tplaunch.torch_private import storage_id

_NARROW = (torch.bfloat16, torch.float16)  # whose products a GPU adds up in fp32, and can give unrounded


class Accumulator:
    """Where the gradient of a weight is added up over a step.

    The first addition writes over what a step before has left: nothing need be set to zero, nor read.

    Args:
        total: of the weight's shape, in the storage dtype.
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total
        self.begun = False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b: [rows, k] and [k, columns]."""
        add_products([self], [a], b)

    def add_rows(self, numbers: Tensor, rows: Tensor) -> None:
        """Add rows [n, columns] to those of these numbers, int64 [n]; in order, so that it repeats bit for bit."""
        if not self.begun:
            self.total.zero_()
        self.total.index_put_((numbers,), rows.to(self.total.dtype), accumulate=True)
        self.begun = True

    def add_each(self, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        """Add lefts[i] @ rights[i] to the i-th of as many equal runs of rows: [rows, k] and [k, columns], k at least
        0."""
        for total, left, right in zip(self.total.chunk(len(lefts)), lefts, rights, strict=True):
            add_over_tokens(total, left, right, begun=self.begun)
        self.begun = True

    def add(self, gradient: Tensor) -> None:
        """Add what is there already, of the weight's shape."""
        self.total.add_(gradient) if self.begun else self.total.copy_(gradient)
        self.begun = True

    def finish(self) -> None:
        """End a step: without an addition the gradient is zero."""
        if not self.begun:
            self.total.zero_()
        self.begun = False


def add_products(accumulators: Sequence[Accumulator], lefts: Sequence[Tensor], right: Tensor) -> None:
    """Add lefts[i] @ right to each accumulator, or to all at once.

    Args:
        accumulators: of equally wide weights, all with the same additions so far.
        lefts: [rows, k], one for each, or one for all where `merge` finds them to be one matrix.
        right: [k, columns].
    """
    totals = merge([accumulator.total for accumulator in accumulators])
    for total, left in zip(totals, lefts, strict=True):
        if left.is_cuda and total.dtype == torch.float32 and left.dtype in _NARROW:
            if accumulators[0].begun:
                torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
            else:
                torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            add_over_tokens(total, left, right, begun=accumulators[0].begun)
    for accumulator in accumulators:
        accumulator.begun = True


def widened_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [rows, k] and [k, columns], in fp32 (fp64 for fp64), which a GPU does not round on the way."""
    if left.is_cuda and left.dtype in _NARROW:
        return torch.mm(left, right, out_dtype=torch.float32)
    return matmul(left, right).to(torch.promote_types(left.dtype, torch.float32))


def merge(tensors: list[Tensor]) -> list[Tensor]:
    """Matrices that follow each other in memory as the one matrix that they are; others as they came.

    Args:
        tensors: each [rows, columns], equally wide.
    """
    first = tensors[0]
    if len(tensors) == 1 or torch.compiler.is_compiling():
        return tensors
    storage, end = storage_id(first), first.storage_offset()
    for tensor in tensors:
        if storage_id(tensor) != storage or tensor.storage_offset() != end or not tensor.is_contiguous():
            return tensors
        end += tensor.numel()
    return [first.as_strided((sum(len(t) for t in tensors), first.shape[1]), first.stride())]
