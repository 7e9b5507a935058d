"""What fused element-wise kernels are held against: torch's operations in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tplaunch.model.rope import apply_rope, split_heads
from tplaunch.model.swiglu import geglu, swiglu

ROWS, BATCH, HEADS = 37, 2, (6, 2, 2)


@dataclass(frozen=True)
class Case:
    """A function and what it is given.

    Args:
        function: of x and a rotary table.
        shape: of x.
        table: the shape of half a rotary table.
    """

    function: Callable[[Tensor, Tensor], Tensor | Sequence[Tensor]]
    shape: tuple[int, ...]
    table: tuple[int, ...] = (2, ROWS, 1, 1, 8)


def _split(head_dim: int) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    return lambda x, table: split_heads(x, [heads * head_dim for heads in HEADS], head_dim, table)


CASES = {
    "swiglu": Case(lambda x, table: swiglu(x), (ROWS, BATCH, 2 * 2500)),
    "geglu": Case(lambda x, table: geglu(x), (ROWS, BATCH, 2 * 300)),
    "rotary": Case(_split(16), (ROWS, BATCH, sum(HEADS) * 16)),
    "partial rotary": Case(_split(22), (ROWS, BATCH, sum(HEADS) * 22), (2, ROWS, 1, 1, 6)),
    "positions of each sample": Case(_split(16), (ROWS, BATCH, sum(HEADS) * 16), (2, ROWS, BATCH, 1, 8)),
    "one head": Case(apply_rope, (ROWS, BATCH, 1, 16), (2, 1, 1, 1, 8)),
}


def difference(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """Relative differences, on a device in a dtype, of outputs and of the gradient of x."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=random).to(dtype)
    table = torch.randn(case.table, generator=random).repeat(1, 1, 1, 1, 2)

    def run(x: Tensor, table: Tensor) -> list[Tensor]:
        x.requires_grad_()
        given = case.function(x, table)
        outputs = [given] if isinstance(given, Tensor) else list(given)
        again = torch.Generator().manual_seed(1)
        # As attention gives them: heads before the sequence.
        grads = [torch.randn(out.transpose(0, -2).shape, generator=again).transpose(0, -2) for out in outputs]
        grads = [grad.to(dtype).to(x) for grad in grads]
        return [value.detach().double().cpu() for value in (*outputs, *torch.autograd.grad(outputs, x, grads))]

    found, expected = run(x.to(device), table.to(device)), run(x.double(), table.double())
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
