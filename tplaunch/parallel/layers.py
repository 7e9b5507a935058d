"""Tensor-parallel layers (Shoeybi et al. 2019, arXiv 1909.08053).

Parameters are DTensors on the tp mesh: storage, checkpoints and FSDP2 know their global shape. The forward pass
takes the local slice and calls explicit collectives, so that no DTensor dispatch runs on the hot path.
Activations are [sequence, batch, features]; with sequence parallelism the sequence is this rank's 1/tp slice
between a row-parallel layer and the next column-parallel one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tplaunch.parallel.accumulator import Accumulator, add_products, merge
from tplaunch.parallel.collectives import (
    gather_matmul,
    leave_region,
    matmul_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from tplaunch.parallel.mesh import TensorParallel
from tplaunch.parallel.split_backward import saved, wanted
from tplaunch.torch_private import as_parameter


def parameter(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    """An uninitialised parameter of global `shape`, laid on `mesh`, on the default device and dtype.

    Raises:
        ValueError: a sharded dimension that its mesh dimension does not divide.
    """
    local = list(shape)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            if local[placement.dim] % mesh.size(dim):
                raise ValueError(f"dimension {placement.dim} of {shape} is not divisible by {mesh.size(dim)}")
            local[placement.dim] //= mesh.size(dim)
    stride = torch.empty(shape, device="meta").stride()
    data = DTensor.from_local(
        torch.empty(local), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return as_parameter(data)


def local(param: Tensor) -> Tensor:
    """This rank's slice of a parameter, differentiable.

    A parameter whose gradient autograd accumulates is seen through a view: the engine tells of a view's node, but not
    of a leaf, whether a pass needs its gradient (`split_backward.wanted`).
    """
    if isinstance(param, DTensor):
        return param.to_local()
    return param.view_as(param) if accumulator(param) is None else param


def accumulator(weight: Tensor) -> Accumulator | None:
    """Where the gradient of a weight is added up in place; None where it is handed to autograd. Asked in the forward
    pass: what a backward pass reads of a weight is not always the parameter.
    """
    return getattr(weight, "accumulator", None)


class _ColumnParallel(torch.autograd.Function):
    """y_i = x W_i^T for several W_i that share x, side by side: one collective pair for all of them, and one matmul
    where the weights follow each other in memory (`FlatSharding`).

    With sequence parallelism only the 1/tp slice of x is kept, and gathered again in the backward pass; that
    gather runs beside the input-gradient matmul, and the reduction of the input gradient beside the weight one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, *weights: Tensor) -> Tensor:
        ctx.tp = tp
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(x, *weights)
        merged = merge(list(weights))
        if tp.fused:
            outputs = gather_matmul(x, [weight.t() for weight in merged], tp)[1]
        else:
            if tp.sequence_parallel:
                x = wait(start_all_gather(x, tp))
            outputs = [F.linear(x, weight) for weight in merged]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        need_x, *need_each = wanted(ctx, 0, *range(2, 2 + len(ctx.accumulators)))
        need_weights = any(need_each)
        x, *weights = saved(ctx, activations=need_weights)
        merged = merge(weights)
        grads = grad.split([len(weight) for weight in merged], -1)
        gathering = start_all_gather(x, tp) if tp.sequence_parallel and need_weights else x
        grad_x, reducing = None, need_x and tp.size > 1 and not tp.fused
        if need_x and tp.fused:
            grad_x = matmul_scatter(grad, merged[0] if len(merged) == 1 else torch.cat(merged), tp)
        elif need_x:
            grad_x = grads[0] @ merged[0]
            for part, weight in zip(grads[1:], merged[1:], strict=True):
                grad_x += part @ weight
        if tp.sequence_parallel and need_weights:
            gathering = wait(gathering)
        if grad_x is not None and reducing:
            grad_x = (start_reduce_scatter if tp.sequence_parallel else start_all_reduce)(grad_x, tp)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if need_weights:
            rows = gathering.flatten(0, -2)
            lefts = [part.flatten(0, -2).t() for part in grads]
            if ctx.accumulators[0] is not None:
                add_products(ctx.accumulators, lefts, rows)
            else:
                products = [left @ rows for left in lefts]
                sizes = [len(weight) for weight in weights]
                grad_weights = products if len(products) == len(weights) else list(products[0].split(sizes))
        if grad_x is not None and reducing:
            grad_x = wait(grad_x)
        return grad_x, None, *grad_weights


class _RowParallel(torch.autograd.Function):
    """y = sum over tp ranks of x_r W_r^T; with sequence parallelism each rank keeps its slice of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, weight: Tensor) -> Tensor:
        ctx.tp = tp
        ctx.accumulator = accumulator(weight)
        ctx.save_for_backward(x, weight)
        if tp.fused:
            return matmul_scatter(x, weight.t(), tp)
        y = F.linear(x, weight)
        if tp.size == 1:
            return y
        return wait((start_reduce_scatter if tp.sequence_parallel else start_all_reduce)(y, tp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        need_x, need_weight = wanted(ctx, 0, 2)
        x, weight = saved(ctx, activations=need_weight)
        grad_x = None
        if ctx.tp.fused and need_x:
            grad, (grad_x,) = gather_matmul(grad, [weight], ctx.tp)
        else:
            if ctx.tp.sequence_parallel:
                grad = wait(start_all_gather(grad, ctx.tp))
            grad_x = grad @ weight if need_x else None
        grad_weight = None
        if need_weight:
            left, right = grad.flatten(0, -2).t(), x.flatten(0, -2)
            if ctx.accumulator is not None:
                ctx.accumulator.add_product(left, right)
            else:
                grad_weight = left @ right
        return grad_x, None, grad_weight


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are split over the tp ranks.

    Args:
        in_features, out_features: global sizes.
        bias: add one, split like the output.
        tp: the group.
        mesh, placements: where the weight lies when not simply row-split over tp (replicated key/value heads).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: TensorParallel,
        mesh: DeviceMesh | None = None,
        placements: tuple[Placement, ...] = (Shard(0),),
    ) -> None:
        super().__init__()
        self.tp = tp
        mesh = mesh or tp.mesh
        self.weight = parameter((out_features, in_features), mesh, placements)
        self.bias = parameter((out_features,), mesh, placements) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[s or s/tp, b, in_features] -> [s, b, out_features/tp]."""
        return column_parallel(x, self)


def column_parallel(x: Tensor, *layers: ColumnParallelLinear) -> Tensor:
    """Apply several column-parallel layers, all with a bias or none, to one input with one collective pair.

    Args:
        x: [s or s/tp, b, in_features].

    Returns:
        [s, b, sum of out_features/tp], the layers' outputs side by side.
    """
    y = _ColumnParallel.apply(x, layers[0].tp, *(local(layer.weight) for layer in layers))
    biases = [local(layer.bias) for layer in layers if layer.bias is not None]
    return y + (biases[0] if len(biases) == 1 else torch.cat(biases)) if biases else y


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are split over the tp ranks. The bias is whole on each and added once."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter((out_features, in_features), tp.mesh, (Shard(1),))
        self.bias = parameter((out_features,), tp.mesh, (Replicate(),)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in_features/tp] -> [s or s/tp, b, out_features]."""
        y = _RowParallel.apply(x, self.tp, local(self.weight))
        return y if self.bias is None else y + local(self.bias)


class VocabParallelEmbedding(nn.Module):
    """An embedding table whose rows are split over the tp ranks."""

    def __init__(self, rows: int, hidden_size: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter((rows, hidden_size), tp.mesh, (Shard(0),))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] -> [s or s/tp, b, hidden_size]."""
        weight = local(self.weight)
        tokens = tokens.t()
        if self.tp.size == 1:
            return _lookup(tokens, weight)
        tokens = tokens - self.tp.rank * weight.shape[0]
        foreign = (tokens < 0) | (tokens >= weight.shape[0])
        rows = _lookup(tokens.masked_fill(foreign, 0), weight)
        return leave_region(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.tp)


def _lookup(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table; their gradients are added to the rows alone where they can be: autograd's own way makes a
    gradient as large as the table for each microbatch."""
    total = accumulator(weight)
    return F.embedding(tokens, weight) if total is None else _Lookup.apply(tokens, weight, total)


class _Lookup(torch.autograd.Function):
    """See `_lookup`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, total: Accumulator) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (tokens,) = ctx.saved_tensors
        ctx.total.add_rows(tokens.flatten(), grad.flatten(0, -2))
        return None, None, None


@contextmanager
def whole_sequences(module: nn.Module) -> Iterator[None]:
    """Run the layers of a module without sequence parallelism within a `with` block: one token cannot be split."""
    parts = [(part, getattr(part, "tp", None)) for part in module.modules()]
    kept = [(part, tp) for part, tp in parts if isinstance(tp, TensorParallel)]
    for part, tp in kept:
        part.tp = replace(tp, sequence_parallel=False, fused=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, tp in kept:  # the very same: compiled code asks for it
            part.tp = tp  # type: ignore[assignment]
