"""A stage's backward pass from its graph alone, whole and in halves."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tplaunch.train.backward import Pass


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4), nn.Tanh()).double()


def run(halves: bool, *, again: bool = False, tokens: bool = False) -> list[Tensor]:
    """Gradients of two microbatches' input, and of the weights."""
    module = net()
    grads = []
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=not tokens)
        y = x + (checkpoint(module, x, use_reentrant=False) if again else module(x))
        passed = Pass(x, y)
        grad = torch.randn(3, 4, dtype=torch.float64)
        grad_x = passed.input_half(grad) if halves else passed.whole(grad)
        if halves and not seed:
            assert all(p.grad is None for p in module.parameters())
        if halves:
            passed.weight_half()
        assert (grad_x is None) == tokens
        grads += [] if grad_x is None else [grad_x]
    return grads + [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_halves_are_the_whole(again: bool, tokens: bool) -> None:
    whole, halves = (run(halves, again=again, tokens=tokens) for halves in (False, True))
    assert len(whole) == len(halves) == 6 + 2 * (not tokens)
    for ours, theirs in zip(halves, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_the_output_is_not_kept() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2 + 1
    storage = weakref.ref(y.untyped_storage())
    passed = Pass(x, y)
    del y
    assert storage() is None
    assert passed.whole(torch.ones(3)) is not None


def test_a_weight_that_is_used_twice_is_refused() -> None:
    """Its gradient from the first place would be counted again from the second."""
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(AssertionError, match="in two places"):
        Pass(x, layer(layer(x))).input_half(torch.ones(3, 4))
