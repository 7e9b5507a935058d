"""What experts have between their matmuls: a gate and its activation, times up, times the weight that the router gives
a row. With the weight here, and not behind the last matmul, nobody needs that matmul's output for the weight's gradient
(Megatron-LM's experts do so, too)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["swiglu", "geglu", "swiglu_clamped"]
LIMIT, SLOPE = 7.0, 1.702  # gpt-oss: bounds of gate and up, and what the gate is multiplied by in its sigmoid
_PIECE = 1 << 17  # elements


def gated(gate: Tensor, up: Tensor, weights: Tensor, kind: Kind) -> Tensor:
    """act(gate) * up * weight: [rows, f] twice, [rows] -> [rows, f].

    It keeps what it reads; act(gate) is made again in the backward pass.

    Args:
        kind: SwiGLU, GeGLU in tanh form, or gpt-oss's: gate min(gate, 7), up between -7 and 7, gate sigmoid(1.702 gate)
            (up + 1).
    """
    return _Gated.apply(gate, up, weights, kind)


def swiglu_clamped(x: Tensor) -> Tensor:
    """gpt-oss's, without weights, of gate and up side by side: [..., 2 f] -> [..., f]."""
    gate, up = x.chunk(2, -1)
    return _Gated.apply(gate, up, x.new_ones(x.shape[:-1]), "swiglu_clamped")


def _act(gate: Tensor, kind: Kind) -> Tensor:
    if kind == "swiglu":
        return F.silu(gate)
    if kind == "geglu":
        return F.gelu(gate, approximate="tanh")
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(SLOPE * gate)


def _act_backward(grad: Tensor, gate: Tensor, kind: Kind) -> Tensor:
    """The gradient of gate; grad, that of `_act`, may be changed."""
    if kind == "swiglu":
        return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    if kind == "geglu":
        return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")
    low = gate.clamp(max=LIMIT)
    sigmoid = torch.sigmoid(SLOPE * low)
    return grad.mul_(sigmoid * (1 + SLOPE * low * (1 - sigmoid))).masked_fill_(gate > LIMIT, 0.0)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor, kind: Kind) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(gate, up, weights)
        (made,) = _by_pieces(partial(_forward, kind=kind), gate, up, weights)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad_gate, grad_up, grad_weights = _by_pieces(partial(_backward, kind=ctx.kind), *ctx.saved_tensors, grad)
        return grad_gate, grad_up, grad_weights, None


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
    acted, grad_acted = _act(gate, kind), grad * _bounded(up, kind)
    grad_weights = (acted * grad_acted).sum(-1, dtype=weights.dtype)
    weights = weights.unsqueeze(-1)
    grad_up = acted.mul_(grad).mul_(weights)
    if kind == "swiglu_clamped":
        grad_up.masked_fill_(up.abs() > LIMIT, 0.0)
    return _act_backward(grad_acted.mul_(weights), gate, kind), grad_up, grad_weights


def _bounded(up: Tensor, kind: Kind) -> Tensor:
    return up.clamp(-LIMIT, LIMIT) + 1 if kind == "swiglu_clamped" else up
