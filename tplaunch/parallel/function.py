"""Autograd functions that cost nothing where no gradient is wanted."""

from __future__ import annotations

from typing import Any

import torch


class Function(torch.autograd.Function):
    """torch's, which without gradients is its `forward` alone: `apply` itself takes longer than what many a function
    does to one token."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """See `torch.autograd.Function.apply`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().apply(*args)
        return cls.forward(_Forgetful(), *args)


class _Forgetful:
    """A context of which nothing is asked later."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep nothing."""

    def set_materialize_grads(self, value: bool) -> None:
        """Keep nothing."""
