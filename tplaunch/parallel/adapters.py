"""Low-rank adapters of the parallel linear layers: y + alpha / rank (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685).

    layer            A [rank, in]     x A^T                           B [out, rank]    what is added to
    column-parallel  whole            of the rank's own tokens,       out is sliced    the rank's slice of y
                                      made whole for B
    row-parallel     in is sliced     a part of the sum over ranks,   whole            y, summed: once, not once a rank
                                      summed for B

So what crosses ranks is `rank` wide, and apart from what the layer itself sends. With sequence parallelism the whole
factor meets the rank's own piece of the sequence only: its gradient is summed over the ranks
(`tplaunch.optim.gradients`). Layers that share an input (queries, keys and values) have adapters of their own, one
exchange for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from tplaunch.parallel.collectives import enter_region, leave_region
from tplaunch.parallel.linear import accumulator, local, parameter, products, weight_gradients
from tplaunch.parallel.mesh import TensorParallel
from tplaunch.parallel.split_backward import saved, wanted


class Adapted(nn.Module):
    """A linear layer that may have an adapter: its factors `lora_a` [rank, in] and `lora_b` [out, rank]."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.lora_scale = 1.0

    def adapt(self, rank: int, scale: float, inner: _Place, outer: _Place) -> None:
        """Add an adapter, uninitialised, on the default device and dtype.

        Args:
            scale: alpha / rank.
            inner, outer: mesh and placements of A, and of B.
        """
        weight = self.get_parameter("weight")
        self.lora_a = parameter((rank, weight.shape[1]), *inner)
        self.lora_b = parameter((weight.shape[0], rank), *outer)
        self.lora_scale = scale


_Place = tuple[DeviceMesh, tuple[Placement, ...]]


def add_columns(y: Tensor, x: Tensor, layers: Sequence[Adapted], tp: TensorParallel) -> Tensor:
    """Add to column-parallel layers' outputs, in place, what their adapters give.

    Args:
        y: [s, b, sum of out/tp], the layers' outputs side by side.
        x: [s or s/tp, b, in], their input.
    """
    places, inner, outer, first = [], [], [], 0
    for layer in layers:
        last = first + local(layer.get_parameter("weight")).shape[0]
        if layer.lora_a is not None and layer.lora_b is not None:
            places.append(slice(first, last))
            inner.append(layer.lora_a)
            outer.append(local(layer.lora_b))
            scale = layer.lora_scale
        first = last
    if not places:
        return y
    return _Add.apply(y, enter_region(products(x, inner), tp), scale, places, *outer)


def add_rows(y: Tensor, x: Tensor, layer: Adapted, tp: TensorParallel) -> Tensor:
    """Add to a row-parallel layer's output, in place, what its adapter gives.

    Args:
        y: [s or s/tp, b, out], summed over the tp ranks.
        x: [s, b, in/tp], its input.
    """
    if layer.lora_a is None or layer.lora_b is None:
        return y
    short = leave_region(products(x, [layer.lora_a]), tp)
    return _Add.apply(y, short, layer.lora_scale, [slice(0, y.shape[-1])], local(layer.lora_b))


class _Add(torch.autograd.Function):
    """y[..., place] += scale * h_i B_i^T for several B_i, each with its own columns of h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, scale: float, places: list[slice], *outer: Tensor) -> Tensor:
        h = h * scale
        ctx.scale, ctx.places = scale, places
        ctx.accumulators = [accumulator(weight) for weight in outer]
        ctx.save_for_backward(h, *outer)
        ctx.mark_dirty(y)
        rows = y.view(-1, y.shape[-1])
        for place, part, weight in zip(places, h.flatten(0, -2).split(_ranks(outer), -1), outer, strict=True):
            rows[:, place].addmm_(part, weight.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_h, *need_each = wanted(ctx, 0, 1, *range(4, 4 + len(ctx.places)))
        h, *outer = saved(ctx, activations=any(need_each))
        grads = [grad[..., place] for place in ctx.places]
        grad_h = None
        if need_h:
            grad_h = torch.cat([part @ weight for part, weight in zip(grads, outer, strict=True)], -1) * ctx.scale
        made: list[Tensor | None] = [None] * len(outer)
        if any(need_each):
            each = zip(ctx.accumulators, grads, h.split(_ranks(outer), -1), outer, strict=True)
            made = [weight_gradients([into], part, short, [weight])[0] for into, part, short, weight in each]
        return grad, grad_h, None, None, *made


def _ranks(outer: Sequence[Tensor]) -> list[int]:
    return [weight.shape[1] for weight in outer]
