"""Grouped matmuls: rows in runs, each run with a matrix of its own, as autograd functions (`Groups`).

On a GPU in bf16 one kernel does all runs (`torch.nn.functional.grouped_mm`); elsewhere, a matmul each, and none for an
expert without rows. Weights lie [experts * h, f], one expert's rows below another's. Every row of a result is written:
there are as many as the runs have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.kernels.matmul import matmul_into
from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.experts import Groups
from tplaunch.parallel.function import Function
from tplaunch.parallel.linear import accumulator, for_weights
from tplaunch.parallel.split_backward import saved, wanted

_ALIGN = 16  # bytes: what the kernel asks of rows


def grouped_columns(x: Tensor, groups: Groups, *weights: Tensor) -> tuple[Tensor, ...]:
    """x_e W_ie for several W_i that share x: [rows, h] -> [rows, f] each.

    Args:
        groups: the rows.
        weights: each [experts * h, f].
    """
    return _GroupedColumns.apply(x, groups, *weights)


def grouped_row(x: Tensor, groups: Groups, weight: Tensor) -> Tensor:
    """x_e W_e^T: [rows, f] -> [rows, h].

    Args:
        groups: the rows.
        weight: [experts * h, f].
    """
    return _GroupedRow.apply(x, groups, weight)


def add_group_bias(y: Tensor, groups: Groups, bias: Tensor, weights: Tensor | None = None) -> Tensor:
    """Each row with its expert's bias.

    Args:
        y: [rows, n].
        groups: the rows.
        bias: [experts, n].
        weights: [rows], which the biases are multiplied by.
    """
    return _AddBias.apply(y, bias, weights, groups)


def _has_kernel(x: Tensor, *weights: Tensor) -> bool:
    """Whether one kernel does all groups."""
    aligned = all(tensor.shape[-1] * tensor.element_size() % _ALIGN == 0 for tensor in (x, *weights))
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and len(x) > 0


def _multiply(x: Tensor, matrices: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """x_e M_e: [rows, k] and [experts, k, n] -> [rows, n]; added to `into`, if that is there."""
    if _has_kernel(x, matrices.transpose(1, 2) if matrices.stride(-1) != 1 else matrices):
        product = F.grouped_mm(x.contiguous(), matrices, offs=groups.ends)
        return product if into is None else into.add_(product)
    out = x.new_empty(len(x), matrices.shape[2]) if into is None else into
    for rows, matrix, total in zip(x.split(groups.sizes), matrices, out.split(groups.sizes), strict=True):
        matmul_into(total, rows, matrix, add=into is not None)
    return out


def _weight_gradient(total: Accumulator | None, left: Tensor, right: Tensor, groups: Groups) -> Tensor | None:
    """left_e^T right_e, one below the other: [rows, h] and [rows, f] -> [experts * h, f]; None where it was added up in
    place."""
    if _has_kernel(left, right):
        product = F.grouped_mm(left.contiguous().t(), right.contiguous(), offs=groups.ends)
        # torch's own tests leave out what this is of an expert without rows.
        product = product.masked_fill_((groups.counts == 0).view(-1, 1, 1), 0.0).flatten(0, 1)
        if total is None:
            return product
        total.add(product)
        return None
    lefts = [rows.t() for rows in left.split(groups.sizes)]
    rights = right.split(groups.sizes)
    if total is not None:
        total.add_each(lefts, rights)
        return None
    gradient = Accumulator(left.new_empty(len(lefts) * left.shape[1], right.shape[1]))
    gradient.add_each(lefts, rights)
    return gradient.total


def _by_expert(weight: Tensor, groups: Groups) -> Tensor:
    """[experts * h, f] -> [experts, h, f]."""
    return weight.view(len(groups.counts), -1, weight.shape[1])


class _GroupedColumns(Function):
    """See `grouped_columns`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(for_weights(ctx, 2, x), *weights)
        return tuple(_multiply(x, _by_expert(weight, groups), groups) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups: Groups = ctx.groups
        need_x, *need_each = wanted(ctx, 0, *range(2, 2 + len(grads)))
        x, *weights = saved(ctx, activations=any(need_each))
        grad_x = None
        for grad, weight in zip(grads, weights, strict=True) if need_x else ():
            grad_x = _multiply(grad, _by_expert(weight, groups).transpose(1, 2), groups, into=grad_x)
        if not any(need_each):
            return grad_x, None, *[None] * len(grads)
        totals: Sequence[Accumulator | None] = ctx.accumulators
        made = [_weight_gradient(total, x, grad, groups) for total, grad in zip(totals, grads, strict=True)]
        return grad_x, None, *made


class _GroupedRow(Function):
    """See `grouped_row`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, weight: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.accumulator = accumulator(weight)
        ctx.save_for_backward(for_weights(ctx, 2, x), weight)
        return _multiply(x, _by_expert(weight, groups).transpose(1, 2), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        groups: Groups = ctx.groups
        need_x, need_weight = wanted(ctx, 0, 2)
        x, weight = saved(ctx, activations=need_weight)
        grad_x = _multiply(grad, _by_expert(weight, groups), groups) if need_x else None
        grad_weight = _weight_gradient(ctx.accumulator, grad, x, groups) if need_weight else None
        return grad_x, None, grad_weight


class _AddBias(Function):
    """See `add_group_bias`. Sums over a group's rows are a matmul, which repeats bit for bit on a GPU, too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, weights: Tensor | None, groups: Groups) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(bias, *(() if weights is None else (weights,)))
        spread = bias.index_select(0, groups.numbers())
        return y + spread if weights is None else torch.addcmul(y, spread, weights.unsqueeze(-1).to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        bias, *weights = ctx.saved_tensors
        groups: Groups = ctx.groups
        _, need_bias, *need_weights = wanted(ctx, 0, 1, *([2] if weights else []))
        numbers = groups.numbers()
        grad_bias = grad_weights = None
        if need_bias:
            belongs = (numbers == torch.arange(len(bias), device=bias.device).unsqueeze(-1)).to(grad.dtype)
            for each in weights:
                belongs *= each
            grad_bias = belongs @ grad
        if any(need_weights):
            grad_weights = (grad * bias.index_select(0, numbers)).sum(-1, dtype=weights[0].dtype)
        return grad, grad_bias, grad_weights, None
