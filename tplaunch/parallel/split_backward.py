"""Which gradients a backward pass has to compute, for autograd functions under schedules that split it in two."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from tplaunch.torch_private import will_execute


def wanted(ctx: Any, *places: int) -> list[bool]:
    """Whether the backward pass that runs now needs the gradient of each of a function's first tensors.

    `ctx.needs_input_grad` tells whether any pass could. A zero-bubble schedule runs the backward pass twice, for the
    gradients of activations and later for those of weights (Qi et al. 2023, arXiv 2401.10241); torch's own operations
    ask the autograd engine which gradients this pass needs. A function that does not ask computes both in both passes.

    Args:
        ctx: the function's context, in its backward pass.
        places: where these tensors stand among the function's inputs.
    """
    if torch.compiler.is_compiling():  # a compiled pass is never split
        return [ctx.needs_input_grad[place] for place in places]
    return [node is not None and _runs(node) for node, _ in ctx.next_functions[: len(places)]]


def _runs(node: Any) -> bool:
    # The engine does not answer for leaves. None is met here but in tests: weights come through `to_local`.
    return "AccumulateGrad" in node.name() or will_execute(node)


class _Pass(threading.local):
    """What the backward pass that runs on this thread wants of a function's saved tensors."""

    without_activations = False


_pass = _Pass()


def saved(ctx: Any, *, activations: bool) -> tuple[Tensor, ...]:
    """A function's saved tensors, in its backward pass.

    Args:
        activations: whether this pass reads what is not a weight of them. If not, nothing is made again for it
            (`tplaunch.model.recompute`): there may be any tensor in its place.
    """
    if activations or torch.compiler.is_compiling():
        return ctx.saved_tensors
    _pass.without_activations = True
    try:
        return ctx.saved_tensors
    finally:
        _pass.without_activations = False


def reads_activations() -> bool:
    """Whether the function that asks for its saved tensors now reads those that are no weights; see `saved`."""
    return not _pass.without_activations


def read_once(weight: Tensor, x: Tensor) -> Tensor:
    """Give a weight to several functions of x: a backward pass that is split in two looks for weights beside the way to
    the stage's input, each in one place."""
    return _ReadOnce.apply(weight, x)


class _ReadOnce(torch.autograd.Function):
    """Lies on the way to x, but changes nothing there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
