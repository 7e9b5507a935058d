"""What experts have between their matmuls: a gate and its activation, times up, times the weight that the router gives
a row. With the weight here, and not behind the last matmul, nobody needs that matmul's output for the weight's gradient
(Megatron-LM's experts do so, too)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.parallel.split_backward import wanted

Kind = Literal["swiglu", "geglu", "swiglu_clamped"]
LIMIT, SLOPE = 7.0, 1.702  # gpt-oss: bounds of gate and up, and what the gate is multiplied by in its sigmoid


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
        return _act(gate, kind).mul_(_bounded(up, kind)).mul_(weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gate, up, weights = ctx.saved_tensors
        kind: Kind = ctx.kind
        need_weights = wanted(ctx, 0, 1, 2)[2]
        acted, grad_acted = _act(gate, kind), grad * _bounded(up, kind)
        grad_weights = (acted * grad_acted).sum(-1, dtype=weights.dtype) if need_weights else None
        weights = weights.unsqueeze(-1)
        grad_up = acted.mul_(grad).mul_(weights)
        if kind == "swiglu_clamped":
            grad_up.masked_fill_(up.abs() > LIMIT, 0.0)
        return _act_backward(grad_acted.mul_(weights), gate, kind), grad_up, grad_weights, None


def _bounded(up: Tensor, kind: Kind) -> Tensor:
    return up.clamp(-LIMIT, LIMIT) + 1 if kind == "swiglu_clamped" else up
