"""What gated MLPs have between their matmuls: a gate and its activation, times up (Shazeer 2020, arXiv 2002.05202); of
experts, times the weight that the router gives a row, too. With the weight here, and not behind the last matmul, nobody
needs that matmul's output for the weight's gradient (Megatron-LM's experts do so, too).

Everything keeps what it reads: act(gate) is made again in the backward pass, for an element-wise operation costs less
than the memory does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.kernels import fused
from tplaunch.kernels.fused import Kind
from tplaunch.parallel.function import Function

LIMIT, SLOPE = 7.0, 1.702  # gpt-oss: bounds of gate and up, and what the gate is multiplied by in its sigmoid
_PIECE = 1 << 17  # elements


def gated(gate: Tensor, up: Tensor, weights: Tensor, kind: Kind) -> Tensor:
    """act(gate) * up * weight: [rows, f] twice, [rows] -> [rows, f].

    Args:
        kind: SwiGLU, GeGLU in tanh form, or gpt-oss's: gate min(gate, 7), up between -7 and 7, gate sigmoid(1.702 gate)
            (up + 1).
    """
    return _Weighed.apply(gate, up, weights, kind)


def side_by_side(x: Tensor, kind: Kind) -> Tensor:
    """act(gate) * up: [..., 2 f], gate before up -> [..., f]."""
    if torch.compiler.is_compiling():  # which sees the same, and makes one kernel of each pass
        gate, up = x.chunk(2, -1)
        return _act(gate, kind) * _bounded(up, kind)
    return _SideBySide.apply(x, kind)


def _act(gate: Tensor, kind: Kind) -> Tensor:
    if kind == "swiglu":
        return F.silu(gate)
    if kind == "geglu":
        return F.gelu(gate, approximate="tanh")
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(SLOPE * gate)


def _bounded(up: Tensor, kind: Kind) -> Tensor:
    return up.clamp(-LIMIT, LIMIT) + 1 if kind == "swiglu_clamped" else up


def _gradients(gate: Tensor, up: Tensor, grad: Tensor, kind: Kind, by_gate: Tensor, by_up: Tensor) -> None:
    """Write the gradients of gate and up to tensors of their own, from that of act(gate) * up."""
    torch.mul(grad, _bounded(up, kind), out=by_gate)
    if kind == "swiglu":
        torch.ops.aten.silu.out(gate, out=by_up).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(by_gate, gate, grad_input=by_gate)
        return
    torch.mul(grad, _act(gate, kind), out=by_up)
    if kind == "geglu":
        by_gate.copy_(torch.ops.aten.gelu_backward(by_gate, gate, approximate="tanh"))
        return
    by_up.masked_fill_(up.abs() > LIMIT, 0.0)
    low = gate.clamp(max=LIMIT)
    share = torch.sigmoid(SLOPE * low)
    by_gate.mul_(share * (1 + SLOPE * low * (1 - share))).masked_fill_(gate > LIMIT, 0.0)


class _SideBySide(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        if fused.fits(x):
            return fused.gated(gate, up, None, kind)
        return _act(gate, kind).mul_(_bounded(up, kind))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        (gate, up), (by_gate, by_up) = x.chunk(2, -1), out.chunk(2, -1)
        if fused.fits(x):
            fused.gated_backward(gate, up, None, grad, by_gate, by_up, ctx.kind)
        else:
            _gradients(gate, up, grad, ctx.kind, by_gate, by_up)
        return out, None


class _Weighed(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor, kind: Kind) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(gate, up, weights)
        if fused.fits(gate):
            return fused.gated(gate, up, weights, kind)
        (made,) = _by_pieces(partial(_forward, kind=kind), gate, up, weights)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, up, weights = ctx.saved_tensors
        if fused.fits(gate):
            by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
            by_weights = fused.gated_backward(gate, up, weights, grad, by_gate, by_up, ctx.kind)
        else:
            by_gate, by_up, by_weights = _by_pieces(partial(_backward, kind=ctx.kind), gate, up, weights, grad)
        assert by_weights is not None
        return by_gate, by_up, by_weights, None


def _by_pieces(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """A function of rows; on a CPU of some at a time: what lies between its operations stays in a core's cache."""
    first = tensors[0]
    height = max(1, _PIECE * len(first) // max(1, first.numel()))
    if first.is_cuda or torch.compiler.is_compiling() or len(first) < 2 * height:
        return function(*tensors)
    whole: tuple[Tensor, ...] = ()
    for begin, some in enumerate(zip(*(x.split(height) for x in tensors), strict=True)):
        made = function(*some)
        whole = whole or tuple(x.new_empty(len(first), *x.shape[1:]) for x in made)
        for x, piece in zip(whole, made, strict=True):
            x[begin * height : begin * height + len(piece)] = piece
    return whole


def _forward(gate: Tensor, up: Tensor, weights: Tensor, kind: Kind) -> tuple[Tensor]:
    return (_act(gate, kind).mul_(_bounded(up, kind)).mul_(weights.unsqueeze(-1)),)


def _backward(gate: Tensor, up: Tensor, weights: Tensor, grad: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
    by_weights = _act(gate, kind).mul_(_bounded(up, kind)).mul_(grad).sum(-1, dtype=weights.dtype)
    _gradients(gate, up, grad * weights.unsqueeze(-1), kind, by_gate, by_up)
    return by_gate, by_up, by_weights
