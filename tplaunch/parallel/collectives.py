"""Collectives of the tensor-parallel region, as autograd functions.

The region's edges come in pairs, each the other's derivative (Shoeybi et al. 2019, arXiv 1909.08053, figure 3;
Korthikanti et al. 2022, arXiv 2205.05198, figure 5). In Megatron's names:

    enter_region  copy_to_tensor_model_parallel_region              forward: nothing         backward: all-reduce
                  with sequence parallelism,
                  gather_from_sequence_parallel_region              forward: all-gather      backward: reduce-scatter
    leave_region  reduce_from_tensor_model_parallel_region          forward: all-reduce      backward: nothing
                  with sequence parallelism,
                  reduce_scatter_to_sequence_parallel_region        forward: reduce-scatter  backward: all-gather

The sequence is dimension 0 (activations are [sequence, batch, hidden]), so that gathering and scattering move
contiguous memory. `start_*` return at once; `wait` gives the result, which lets a matmul run meanwhile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tplaunch.parallel.function import Function
from tplaunch.parallel.mesh import ContextParallel, Ranks, TensorParallel
from tplaunch.torch_private import collective_ops, symmetric_memory_ops


def start_all_reduce(x: Tensor, tp: Ranks, op: str = "sum") -> Tensor:
    return collective_ops.all_reduce.default(x.contiguous(), op, tp.group.group_name)


def start_all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    return collective_ops.all_gather_into_tensor.default(x.contiguous(), ranks.size, ranks.group.group_name)


def start_reduce_scatter(x: Tensor, tp: TensorParallel) -> Tensor:
    return collective_ops.reduce_scatter_tensor.default(x.contiguous(), "sum", tp.size, tp.group.group_name)


def start_all_to_all(x: Tensor, cp: ContextParallel) -> Tensor:
    """The i-th of cp equal parts of dimension 0 goes to rank i; theirs come in the order of the ranks."""
    sizes = [len(x) // cp.size] * cp.size
    return collective_ops.all_to_all_single.default(x.contiguous(), sizes, sizes, cp.group.group_name)


def start_uneven_all_to_all(x: Tensor, sent: list[int], received: list[int], ranks: Ranks) -> Tensor:
    """Rows of x to each rank, as many as `sent` says; theirs come in the order of the ranks, as many as `received`
    says."""
    return collective_ops.all_to_all_single.default(x.contiguous(), received, sent, ranks.group.group_name)


def gather_matmul(x: Tensor, weights: list[Tensor], tp: TensorParallel) -> tuple[Tensor, list[Tensor]]:
    """All-gather fused with the matmuls that follow it; for `tp.fused`.

    Args:
        x: [s/tp, b, k].
        weights: each [k, n].

    Returns:
        The whole x [s, b, k], and x @ weight [s, b, n] for each weight.
    """
    return symmetric_memory_ops.fused_all_gather_matmul.default(x, weights, 0, tp.group.group_name)


def matmul_scatter(x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """Matmul fused with the reduce-scatter that follows it; for `tp.fused`.

    Args:
        x: [s, b, k], of which each tp rank has another part of k.
        weight: [k, n].

    Returns:
        This rank's slice of the sum over the tp ranks, [s/tp, b, n].
    """
    return symmetric_memory_ops.fused_matmul_reduce_scatter.default(x, weight, "sum", 0, tp.group.group_name)


def wait(x: Tensor) -> Tensor:
    return collective_ops.wait_tensor.default(x)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_reduce(grad, ctx.tp)), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return wait(start_all_reduce(x, tp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return wait(start_all_gather(x, tp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_reduce_scatter(grad, ctx.tp)), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return wait(start_reduce_scatter(x, tp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_gather(grad, ctx.tp)), None


def enter_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Give every tp rank the whole of `x` [s or s/tp, ...]; its gradient is summed over them."""
    if tp.size == 1:
        return x
    return _Gather.apply(x, tp) if tp.sequence_parallel else _Copy.apply(x, tp)


def leave_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum the partial `x` [s, ...] over the tp ranks; with sequence parallelism each keeps its [s/tp, ...]."""
    if tp.size == 1:
        return x
    return _Scatter.apply(x, tp) if tp.sequence_parallel else _Reduce.apply(x, tp)
