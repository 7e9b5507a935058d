"""RMSNorm and LayerNorm: whole on every tp rank but for norms over all heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate

from tplaunch.parallel.collectives import start_all_reduce, wait
from tplaunch.parallel.function import Function
from tplaunch.parallel.linear import local, parameter
from tplaunch.parallel.mesh import TensorParallel
from tplaunch.parallel.split_backward import wanted
from tplaunch.recipe.schema import Model


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        plus_one: it multiplies by 1 + weight, in fp32 (Gemma).
    """

    def __init__(self, size: int, eps: float, *, plus_one: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.plus_one = plus_one
        self.weight = parameter((size,), tp.mesh, (Replicate(),))

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight)
        # torch's kernel has no 1 + weight: only a compiler leaves the wide input out of memory.
        if (x.is_cuda and not self.plus_one) or torch.compiler.is_compiling():
            if self.plus_one:
                wide = torch.promote_types(x.dtype, torch.float32)
                return F.rms_norm(x.to(wide), (x.shape[-1],), 1 + weight.to(wide), self.eps).to(x.dtype)
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps, self.plus_one)


class HeadsRMSNorm(nn.Module):
    """RMSNorm over all heads together, which are split over the tp ranks: each has its own part of the weight, and the
    mean of squares is that of the ranks' means, which are of equally many channels. Where several ranks have copies of
    a head, so does the mean; and the gradient that each gives is its part of one, as that which it is given.

    Args:
        size: channels of all heads.
        mesh, placements: where the weight's parts are, as those of the projection before it.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        plus_one: bool,
        tp: TensorParallel,
        mesh: DeviceMesh,
        placements: tuple[Placement, ...],
    ) -> None:
        super().__init__()
        self.tp = tp
        self.eps = eps
        self.plus_one = plus_one
        self.weight = parameter((size,), mesh, placements)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads of this rank, head_dim] -> the same."""
        normed = _RMSNorm.apply(x.flatten(-2), local(self.weight), self.eps, self.plus_one, self.tp)
        return normed.unflatten(-1, x.shape[-2:])


class _RMSNorm(Function):
    """RMSNorm, computed in fp32 (fp64 for fp64). torch's on a CPU is a chain of operations: it takes four times as long
    and, in bf16, keeps fp32 copies of its input; this keeps the input and a number for each token. Means are those of
    all ranks of `tp`, where it is there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, tp: TensorParallel | None = None
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = _mean(norm.square_().div_(x.shape[-1]), tp).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.plus_one, ctx.tp = plus_one, tp
        return (x * scale).mul_(1 + weight.to(dtype) if plus_one else weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight = wanted(ctx, 0, 1)
        normed, wide = x * scale, weight.to(scale.dtype)
        if ctx.plus_one:
            wide = 1 + wide
        product = grad * normed
        grad_x = None
        if need_x:
            mean = _mean((product @ wide).unsqueeze(-1).div_(-x.shape[-1]), ctx.tp)
            grad_x = (grad * wide).addcmul_(normed, mean).mul_(scale).to(x.dtype)
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if need_weight else None
        return grad_x, grad_weight, None, None, None


def _mean(x: Tensor, tp: TensorParallel | None) -> Tensor:
    """The mean over tp ranks; x may be changed."""
    return x if tp is None or tp.size == 1 else wait(start_all_reduce(x, tp)).div_(tp.size)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float, *, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((size,), tp.mesh, (Replicate(),))
        self.bias = parameter((size,), tp.mesh, (Replicate(),))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), local(self.weight), local(self.bias), self.eps)


def make_norm(model: Model, *, tp: TensorParallel) -> RMSNorm | LayerNorm:
    """The norm of the model over its hidden size."""
    if model.norm == "layernorm":
        return LayerNorm(model.hidden_size, model.norm_eps, tp=tp)
    return RMSNorm(model.hidden_size, model.norm_eps, plus_one=model.norm_plus_one, tp=tp)
