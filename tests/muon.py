"""Muon as its papers write it, one matrix after the other, for tests to compare with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def newton_schulz(matrix: Tensor) -> Tensor:
    """Jordan's five quintic steps, in the matrix's own dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / max(float(matrix.norm()), 1e-7)
    for _ in range(5):
        # (X X^T)^n X = X (X^T X)^n: always the smaller product, as everybody does.
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = a * x + b * (gram @ x) + c * (gram @ (gram @ x))
        else:
            gram = x.T @ x
            x = a * x + b * (x @ gram) + c * ((x @ gram) @ gram)
    return x


class PlainMuon(torch.optim.Optimizer):
    """Moonlight's Muon (arXiv 2502.16982, algorithm 1) with Nesterov momentum, written M = mu M + G."""

    def __init__(self, groups: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state, mu, lr = self.state[weight], group["momentum"], group["lr"]
                state["M"] = mu * state.get("M", torch.zeros_like(weight)) + weight.grad
                update = newton_schulz(weight.grad + mu * state["M"])
                update = 0.2 * math.sqrt(max(weight.shape)) * update
                weight.sub_(lr * (update + group["weight_decay"] * weight))
