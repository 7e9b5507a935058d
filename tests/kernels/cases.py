"""What fused element-wise kernels are held against: torch's operations in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from tplaunch.kernels.fused import Kind
from tplaunch.model.gated import gated, side_by_side
from tplaunch.model.rope import apply_rope, split_heads
from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.cross_entropy import IGNORE, output_cross_entropy
from tplaunch.parallel.mesh import TensorParallel

ROWS, BATCH, HEADS, VOCAB = 37, 2, (6, 2, 2), 5001
KINDS: dict[Kind, int] = {"swiglu": 2500, "geglu": 300, "swiglu_clamped": 300}
ALONE = cast(TensorParallel, SimpleNamespace(size=1, rank=0, sequence_parallel=False))


@dataclass(frozen=True)
class Case:
    """A function and what it is given.

    Args:
        function: of x and a rotary table.
        shape: of x.
        table: the shape of half a rotary table.
        begins_here: the backward pass begins at the first output.
    """

    function: Callable[[Tensor, Tensor], Tensor | Sequence[Tensor]]
    shape: tuple[int, ...]
    table: tuple[int, ...] = (2, ROWS, 1, 1, 8)
    begins_here: bool = False


def _side_by_side(kind: Kind, x: Tensor, table: Tensor) -> Tensor:
    return side_by_side(3 * x, kind)


def _weighed(kind: Kind, x: Tensor, table: Tensor) -> Tensor:
    """Of gate, up and weight in the columns of x."""
    width = x.shape[1] // 2
    return gated(*(3 * x[:, :-1]).split(width, 1), x[:, -1].contiguous(), kind)


def _split(head_dim: int) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    return lambda x, table: split_heads(x, [heads * head_dim for heads in HEADS], head_dim, table)


def _loss(*, in_training: bool, **options: Any) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    """The summed loss of x [s, b, h], and in training the gradient of the output matrix, which is made with it."""

    def lose(x: Tensor, table: Tensor) -> Sequence[Tensor]:
        random = torch.Generator().manual_seed(2)
        weight = torch.randn(5008, x.shape[-1], generator=random).to(x)
        labels = torch.randint(VOCAB, x.shape[1::-1], generator=random)
        labels[0, :3] = IGNORE
        total = Accumulator(torch.zeros_like(weight, dtype=torch.promote_types(x.dtype, torch.float32)))
        if in_training:
            weight.accumulator = total  # type: ignore[attr-defined]
        common: dict[str, Any] = {"tp": ALONE, "vocab_size": VOCAB, "chunk": 16, "z_loss": 1e-2, "scale": 0.1}
        loss = output_cross_entropy(x, weight.requires_grad_(), labels.to(x.device), **common, **options)
        return [loss, total.total] if in_training else [loss]

    return lose


CASES = {
    **{kind: Case(partial(_side_by_side, kind), (ROWS, BATCH, 2 * width)) for kind, width in KINDS.items()},
    **{f"{kind} of experts": Case(partial(_weighed, kind), (ROWS, 2 * width + 1)) for kind, width in KINDS.items()},
    "rotary": Case(_split(16), (ROWS, BATCH, sum(HEADS) * 16)),
    "partial rotary": Case(_split(22), (ROWS, BATCH, sum(HEADS) * 22), (2, ROWS, 1, 1, 6)),
    "positions of each sample": Case(_split(16), (ROWS, BATCH, sum(HEADS) * 16), (2, ROWS, BATCH, 1, 8)),
    "loss in training": Case(_loss(in_training=True), (ROWS, BATCH, 24), begins_here=True),
    "loss made again": Case(_loss(in_training=False), (ROWS, BATCH, 24), begins_here=True),
    "capped loss": Case(_loss(in_training=True, softcap=2.0), (ROWS, BATCH, 24), begins_here=True),
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
        if case.begins_here:
            made = torch.autograd.grad(outputs[0], x)
        else:  # as attention gives them: heads before the sequence
            again = torch.Generator().manual_seed(1)
            grads = [torch.randn(out.transpose(0, -2).shape, generator=again).transpose(0, -2) for out in outputs]
            made = torch.autograd.grad(outputs, x, [grad.to(dtype).to(x) for grad in grads])
        return [value.detach().double().cpu() for value in (*outputs, *made)]

    found, expected = run(x.to(device), table.to(device)), run(x.double(), table.double())
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
