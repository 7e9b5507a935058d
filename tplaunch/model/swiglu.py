"""SwiGLU and GeGLU over gate and up side by side (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.kernels import fused


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up: [..., 2 f], gate before up -> [..., f].

    It keeps gate and up alone: silu(gate) is made again in the backward pass, for an element-wise operation costs less
    than the memory does.
    """
    if torch.compiler.is_compiling():  # which sees the same, and makes one kernel of each pass
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return _SwiGLU.apply(x)


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) * up in GELU's tanh form; else as `swiglu`."""
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up
    return _GeGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if fused.fits(x):
            return fused.gated(x, gelu=False)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if fused.fits(x):
            return fused.gated_backward(x, grad, gelu=False)
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if fused.fits(x):
            return fused.gated(x, gelu=True)
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if fused.fits(x):
            return fused.gated_backward(x, grad, gelu=True)
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.gelu(gate, approximate="tanh"), out=grad_up)
        grad_gate.copy_(torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"))
        return out
