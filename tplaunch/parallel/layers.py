"""Tensor-parallel layers (Shoeybi et al. 2019, arXiv 1909.08053).

Parameters are DTensors on the tp mesh: storage, checkpoints and FSDP2 know their global shape. The forward pass
takes the local slice and calls explicit collectives, so that no DTensor dispatch runs on the hot path.
Activations are [sequence, batch, features]; with sequence parallelism the sequence is this rank's 1/tp slice
between a row-parallel layer and the next column-parallel one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tplaunch.kernels.matmul import linear, matmul, over_tokens
from tplaunch.parallel.accumulator import Accumulator, merge
from tplaunch.parallel.adapters import Adapted, add_columns, add_rows
from tplaunch.parallel.collectives import (
    gather_matmul,
    leave_region,
    matmul_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from tplaunch.parallel.function import Function
from tplaunch.parallel.linear import (
    accumulator,
    columns,
    for_weights,
    input_gradient,
    local,
    parameter,
    weight_gradients,
)
from tplaunch.parallel.mesh import ContextParallel, TensorParallel
from tplaunch.parallel.split_backward import saved, wanted


class _ColumnParallel(Function):
    """y_i = x W_i^T for several W_i that share x, side by side: one collective pair for all of them, and one matmul
    where the weights follow each other in memory (`FlatSharding`).

    With sequence parallelism only the 1/tp slice of x is kept, and gathered again in the backward pass; that
    gather runs beside the input-gradient matmul, and the reduction of the input gradient beside the weight one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, *weights: Tensor) -> Tensor:
        ctx.tp = tp
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(for_weights(ctx, 2, x), *weights)
        if tp.fused:
            outputs = gather_matmul(x, [weight.t() for weight in merge(list(weights))], tp)[1]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return columns(wait(start_all_gather(x, tp)) if tp.sequence_parallel else x, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        need_x, *need_each = wanted(ctx, 0, *range(2, 2 + len(ctx.accumulators)))
        need_weights = any(need_each)
        x, *weights = saved(ctx, activations=need_weights)
        gathering = start_all_gather(x, tp) if tp.sequence_parallel and need_weights else x
        grad_x, reducing = None, need_x and tp.size > 1 and not tp.fused
        if need_x and tp.fused:
            merged = merge(weights)
            grad_x = matmul_scatter(grad, merged[0] if len(merged) == 1 else torch.cat(merged), tp)
        elif need_x:
            grad_x = input_gradient(grad, weights)
        if tp.sequence_parallel and need_weights:
            gathering = wait(gathering)
        if grad_x is not None and reducing:
            grad_x = (start_reduce_scatter if tp.sequence_parallel else start_all_reduce)(grad_x, tp)
        grads = weight_gradients(ctx.accumulators, grad, gathering, weights) if need_weights else [None] * len(weights)
        if grad_x is not None and reducing:
            grad_x = wait(grad_x)
        return grad_x, None, *grads


class _RowParallel(Function):
    """y = sum over tp ranks of x_r W_r^T; with sequence parallelism each rank keeps its slice of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, weight: Tensor) -> Tensor:
        ctx.tp = tp
        ctx.accumulator = accumulator(weight)
        ctx.save_for_backward(for_weights(ctx, 2, x), weight)
        if tp.fused:
            return matmul_scatter(x, weight.t(), tp)
        y = linear(x, weight)
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
            grad_x = matmul(grad, weight) if need_x else None
        grad_weight = None
        if need_weight:
            left, right = grad.flatten(0, -2).t(), x.flatten(0, -2)
            if ctx.accumulator is not None:
                ctx.accumulator.add_product(left, right)
            else:
                grad_weight = over_tokens(left, right)
        return grad_x, None, grad_weight


class ColumnParallelLinear(Adapted):
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

    def add_adapter(self, rank: int, scale: float) -> None:
        """See `Adapted.adapt`."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        self.adapt(rank, scale, (self.tp.mesh, (Replicate(),)), (weight.device_mesh, tuple(weight.placements)))

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
    tp = layers[0].tp
    y = _biased(_ColumnParallel.apply(x, tp, *(local(layer.weight) for layer in layers)), layers)
    return add_columns(y, x, layers, tp)


class ColumnPair:
    """Two column-parallel applications to one input, `column_parallel` in two halves, between which something else may
    begin: still one collective pair.

    Whichever of the two needs the whole input first gathers it, and leaves it for the other; so in the forward pass, in
    the backward pass, where the second half comes first, and where an application is made again. The second half leaves
    its gradient of the input to the first, which reduces both at once.

    Args:
        tp: the group. Matmuls are not fused with collectives here.
    """

    def __init__(self, tp: TensorParallel) -> None:
        self.tp = tp
        self.partial: Tensor | None = None
        self._whole: Tensor | None = None

    def first(self, x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, Tensor]:
        """The first half; see `column_parallel`.

        Returns:
            The outputs, and an empty tensor by which the graph knows that `second` belongs to them.
        """
        y, link = _FirstColumns.apply(x, self, *(local(layer.weight) for layer in layers))
        return add_columns(_biased(y, layers), x, layers, self.tp), link

    def second(self, x: Tensor, link: Tensor, *layers: ColumnParallelLinear) -> Tensor:
        """The second half, of the same x."""
        y = _SecondColumns.apply(link, self, *(local(layer.weight) for layer in layers), x.detach())
        return add_columns(_biased(y, layers), x, layers, self.tp)

    def start(self, x: Tensor) -> Tensor:
        """Begin to make x [s or s/tp, ...] whole; `finish` ends that."""
        return start_all_gather(x, self.tp) if self.tp.sequence_parallel and self._whole is None else x

    def finish(self, started: Tensor) -> Tensor:
        """x [s, ...]."""
        if not self.tp.sequence_parallel:
            return started
        if self._whole is None:
            self._whole = whole = wait(started)
        else:
            whole, self._whole = self._whole, None
        return whole


def _biased(y: Tensor, layers: Sequence[ColumnParallelLinear]) -> Tensor:
    """The layers' outputs side by side, and their biases, where they have some."""
    biases = [local(layer.bias) for layer in layers if layer.bias is not None]
    return y + (biases[0] if len(biases) == 1 else torch.cat(biases)) if biases else y


class _FirstColumns(Function):
    """See `ColumnPair.first`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: ColumnPair, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.pair = pair
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(for_weights(ctx, 2, x), *weights)
        ctx.set_materialize_grads(False)
        return columns(pair.finish(pair.start(x)), weights), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, link: None) -> tuple[Tensor | None, ...]:
        pair: ColumnPair = ctx.pair
        tp, accumulators = pair.tp, ctx.accumulators
        need_x, *need_each = wanted(ctx, 0, *range(2, 2 + len(accumulators)))
        x, *weights = saved(ctx, activations=any(need_each))
        started = pair.start(x) if any(need_each) else x
        grad_x = None
        if need_x:
            grad_x = input_gradient(grad, weights)
            if pair.partial is not None:
                grad_x += pair.partial
                pair.partial = None
            if tp.size > 1:
                grad_x = (start_reduce_scatter if tp.sequence_parallel else start_all_reduce)(grad_x, tp)
        grads: list[Tensor | None] = [None] * len(weights)
        if any(need_each):
            grads = weight_gradients(accumulators, grad, pair.finish(started), weights)
        if grad_x is not None and tp.size > 1:
            grad_x = wait(grad_x)
        return grad_x, None, *grads


class _SecondColumns(Function):
    """See `ColumnPair.second`."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, pair: ColumnPair, *tensors: Tensor) -> Tensor:
        *weights, x = tensors
        ctx.pair = pair
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(for_weights(ctx, 2, x), *weights)
        return columns(pair.finish(pair.start(x)), weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pair: ColumnPair = ctx.pair
        need_link, *need_each = wanted(ctx, 0, *range(2, 2 + len(ctx.accumulators)))
        x, *weights = saved(ctx, activations=any(need_each))
        started = pair.start(x) if any(need_each) else x
        if need_link:
            pair.partial = input_gradient(grad, weights)
        grads: list[Tensor | None] = [None] * len(weights)
        if any(need_each):
            grads = weight_gradients(ctx.accumulators, grad, pair.finish(started), weights)
        return None, None, *grads, None


class RowParallelLinear(Adapted):
    """A linear layer whose input features are split over the tp ranks. The bias is whole on each and added once."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter((out_features, in_features), tp.mesh, (Shard(1),))
        self.bias = parameter((out_features,), tp.mesh, (Replicate(),)) if bias else None

    def add_adapter(self, rank: int, scale: float) -> None:
        """See `Adapted.adapt`."""
        self.adapt(rank, scale, (self.tp.mesh, (Shard(1),)), (self.tp.mesh, (Replicate(),)))

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in_features/tp] -> [s or s/tp, b, out_features]."""
        y = add_rows(_RowParallel.apply(x, self.tp, local(self.weight)), x, self, self.tp)
        return y if self.bias is None else y + local(self.bias)


def widened(x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """Apply column-parallel layers without biases, each to its own channels of one input, with one collective pair.
    Matmuls are not fused with it.

    Args:
        x: [s or s/tp, b, channels], those of the first layer, those of the next, and others.

    Returns:
        [s, b, out_features/tp] of each layer, and the other channels whole, [s, b, rest].
    """
    return _Widened.apply(x, layers[0].tp, *(local(layer.weight) for layer in layers))


class _Widened(Function):
    """See `widened`; what is kept and when is gathered is as in `_ColumnParallel`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.tp = tp
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(for_weights(ctx, 2, x), *weights)
        *parts, rest = _channels(wait(start_all_gather(x, tp)) if tp.sequence_parallel else x, weights)
        return *(linear(part, weight) for part, weight in zip(parts, weights, strict=True)), rest.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        need_x, *need_each = wanted(ctx, 0, *range(2, 2 + len(ctx.accumulators)))
        need_weights = any(need_each)
        x, *weights = saved(ctx, activations=need_weights)
        gathering = start_all_gather(x, tp) if tp.sequence_parallel and need_weights else x
        grad_x, reducing = None, need_x and tp.size > 1
        if need_x:
            grad_x = torch.cat([*map(matmul, grads[:-1], weights), grads[-1]], -1)
        if tp.sequence_parallel and need_weights:
            gathering = wait(gathering)
        if grad_x is not None and reducing:
            grad_x = (start_reduce_scatter if tp.sequence_parallel else start_all_reduce)(grad_x, tp)
        made: list[Tensor | None] = [None] * len(weights)
        if need_weights:
            parts = _channels(gathering, weights)[:-1]
            each = zip(ctx.accumulators, grads[:-1], parts, weights, strict=True)
            made = [weight_gradients([into], grad, part, [weight])[0] for into, grad, part, weight in each]
        if grad_x is not None and reducing:
            grad_x = wait(grad_x)
        return grad_x, None, *made


def _channels(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What each weight is multiplied with, and the rest."""
    sizes = [weight.shape[1] for weight in weights]
    return x.split([*sizes, x.shape[-1] - sum(sizes)], -1)


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


class _Lookup(Function):
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
    """Run the layers of a module without sequence and context parallelism within a `with` block: one token cannot be
    split."""
    kept = [
        (part, name, value)
        for part in module.modules()
        for name in ("tp", "cp")
        if isinstance(value := getattr(part, name, None), TensorParallel | ContextParallel)
    ]
    for part, name, value in kept:
        whole = replace(value, sequence_parallel=False, fused=False) if isinstance(value, TensorParallel) else None
        setattr(part, name, whole)
    try:
        yield
    finally:
        for part, name, value in kept:  # the very same: compiled code asks for it
            setattr(part, name, value)
