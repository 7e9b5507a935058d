"""Parameters, and linear layers that need no communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tplaunch.kernels.matmul import linear, matmul, over_tokens
from tplaunch.parallel.accumulator import Accumulator, add_products, merge
from tplaunch.parallel.function import Function
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
    return param.view_as(param) if torch.is_grad_enabled() and accumulator(param) is None else param


def accumulator(weight: Tensor) -> Accumulator | None:
    """Where the gradient of a weight is added up in place; None where it is handed to autograd. Asked in the forward
    pass: what a backward pass reads of a weight is not always the parameter.
    """
    return getattr(weight, "accumulator", None)


def columns(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x W_i^T side by side; x is whole."""
    outputs = [linear(x, weight) for weight in merge(list(weights))]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def input_gradient(grad: Tensor, weights: list[Tensor]) -> Tensor:
    """This rank's part of the gradient of x, from that of `columns`."""
    merged = merge(weights)
    first, *others = grad.split([len(weight) for weight in merged], -1)
    grad_x = matmul(first, merged[0])
    for part, weight in zip(others, merged[1:], strict=True):
        grad_x += matmul(part, weight)
    return grad_x


def weight_gradients(
    accumulators: Sequence[Accumulator | None], grad: Tensor, x: Tensor, weights: list[Tensor]
) -> list[Tensor | None]:
    """Those of the weights of `columns`; None where they were added up in place."""
    rows, sizes = x.flatten(0, -2), [len(weight) for weight in merge(weights)]
    lefts = [part.flatten(0, -2).t() for part in grad.split(sizes, -1)]
    into = [accumulator for accumulator in accumulators if accumulator is not None]
    if into:
        add_products(into, lefts, rows)
        return [None] * len(weights)
    products = [over_tokens(left, rows) for left in lefts]
    return [*products] if len(products) == len(weights) else [*products[0].split([len(weight) for weight in weights])]


def for_weights(ctx: Any, first: int, x: Tensor) -> Tensor | None:
    """x, to be kept where the gradient of a weight needs it: of one that is the function's `first` input, or comes
    behind it. Frozen weights have none."""
    return x if any(ctx.needs_input_grad[first:]) else None


class WholeLinear(nn.Module):
    """A linear layer without a bias that every tp rank has whole, and applies to its own piece of the sequence with
    sequence parallelism."""

    def __init__(self, in_features: int, out_features: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = parameter((out_features, in_features), tp.mesh, (Replicate(),))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return whole_linear(x, self)


def whole_linear(x: Tensor, *layers: WholeLinear) -> Tensor:
    """Several such layers' outputs of one input, side by side."""
    return products(x, [layer.weight for layer in layers])


def products(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x W^T of several parameters, side by side, of this rank's slices alone: [..., in] -> [..., sum of out]."""
    return _WholeLinear.apply(x, *(local(weight) for weight in weights))


class _WholeLinear(Function):
    """See `whole_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.accumulators = [accumulator(weight) for weight in weights]
        ctx.save_for_backward(for_weights(ctx, 1, x), *weights)
        return columns(x, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, *need_each = wanted(ctx, *range(1 + len(ctx.accumulators)))
        x, *weights = saved(ctx, activations=any(need_each))
        grad_x = input_gradient(grad, weights) if need_x else None
        grads: list[Tensor | None] = [None] * len(weights)
        if any(need_each):
            grads = weight_gradients(ctx.accumulators, grad, x, weights)
        return grad_x, *grads
