"""The output layer and its cross-entropy against torch's own operations, on one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.cross_entropy import IGNORE, output_cross_entropy
from tplaunch.parallel.mesh import TensorParallel

S, B, WIDTH, VOCAB, ROWS = 5, 3, 8, 11, 16
ALONE = cast(TensorParallel, SimpleNamespace(size=1, rank=0, sequence_parallel=False))


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def draw_labels() -> Tensor:
    labels = torch.randint(VOCAB, (B, S))
    labels[1, 2] = labels[2, :2] = IGNORE
    labels[0, 0], labels[0, 1] = 0, VOCAB - 1
    return labels


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    logits = (hidden @ weight[:VOCAB].t()).transpose(0, 1)
    z = logits.logsumexp(-1)[labels != IGNORE]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") + z_loss * z.square().sum()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_loss_and_its_gradients(in_place: bool, chunk: int, z_loss: float) -> None:
    hidden, weight, labels = draw(S, B, WIDTH), draw(ROWS, WIDTH), draw_labels()
    total = Accumulator(torch.full_like(weight, torch.nan).detach())
    if in_place:
        weight.accumulator = total  # type: ignore[attr-defined]
    options: dict[str, Any] = {"tp": ALONE, "vocab_size": VOCAB, "chunk": chunk, "z_loss": z_loss}
    loss = output_cross_entropy(hidden, weight, labels, **options, scale=0.7)
    theirs = 0.7 * expected(hidden, weight, labels, z_loss)
    assert (loss.shape, loss.dtype) == ((1,), torch.float64)
    torch.testing.assert_close(loss.squeeze(), theirs)
    loss.backward()
    grad_hidden, grad_weight = torch.autograd.grad(theirs, (hidden, weight))
    torch.testing.assert_close(hidden.grad, grad_hidden)
    torch.testing.assert_close(total.total if in_place else weight.grad, grad_weight)
    with torch.no_grad():
        torch.testing.assert_close(output_cross_entropy(hidden, weight, labels, **options), loss / 0.7)
    assert (weight.grad is None) == in_place


def test_a_loss_that_is_scaled_afterwards() -> None:
    """Right where the gradients are not made in the forward pass, refused where they are."""
    hidden, weight, labels = draw(S, B, WIDTH), draw(ROWS, WIDTH), draw_labels()
    (2 * output_cross_entropy(hidden, weight, labels, tp=ALONE, vocab_size=VOCAB)).backward()
    torch.testing.assert_close(weight.grad, 2 * torch.autograd.grad(expected(hidden, weight, labels, 0.0), weight)[0])
    weight.accumulator = Accumulator(torch.zeros_like(weight).detach())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="give its factor as `scale`"):
        (2 * output_cross_entropy(hidden, weight, labels, tp=ALONE, vocab_size=VOCAB)).backward()


def test_in_bf16_the_logits_are_fp32_and_large_ones_do_no_harm() -> None:
    hidden, weight, labels = (
        draw(S, B, WIDTH, dtype=torch.bfloat16),
        draw(ROWS, WIDTH, dtype=torch.bfloat16),
        draw_labels(),
    )
    loss = output_cross_entropy(40 * hidden, weight, labels, tp=ALONE, vocab_size=VOCAB)
    assert loss.dtype == torch.float32
    logits = ((40 * hidden) @ weight[:VOCAB].t()).float().transpose(0, 1)
    assert logits.max() > 100  # the exponential of which fp32 does not hold
    torch.testing.assert_close(loss.squeeze(), F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))


def test_gradients_that_are_not_asked_for_are_not_made() -> None:
    hidden, weight, labels = draw(S, B, WIDTH), draw(ROWS, WIDTH), draw_labels()
    for frozen in (hidden, weight):
        for tensor in (hidden, weight):
            tensor.grad = None
            tensor.requires_grad_(tensor is not frozen)
        output_cross_entropy(hidden, weight, labels, tp=ALONE, vocab_size=VOCAB).backward()
        assert [tensor.grad is None for tensor in (hidden, weight)] == [frozen is hidden, frozen is weight]
