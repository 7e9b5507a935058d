"""RMSNorm and LayerNorm, whole on every tp rank."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from tplaunch.parallel.layers import local, parameter
from tplaunch.parallel.mesh import TensorParallel
from tplaunch.recipe.schema import Model


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((size,), tp.mesh, (Replicate(),))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), local(self.weight), self.eps)


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
    kind = RMSNorm if model.norm == "rmsnorm" else LayerNorm
    return kind(model.hidden_size, model.norm_eps, tp=tp)
