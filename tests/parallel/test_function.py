"""Functions that make no graph where there is none to make."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tplaunch.parallel.function import Function


class _Square(Function):
    saw: ClassVar[list[type]] = []  # contexts

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Square.saw.append(type(ctx))
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_only_with_gradients_it_is_torchs() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    with torch.no_grad():
        assert not _Square.apply(x).requires_grad
    _Square.apply(x).backward()
    assert x.grad is not None and x.grad.item() == 6
    assert not issubclass(_Square.saw[0], torch.autograd.function.FunctionCtx)
    assert issubclass(_Square.saw[1], torch.autograd.function.FunctionCtx)
