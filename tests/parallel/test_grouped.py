"""Grouped matmuls against a matmul for each expert; experts without rows, ranks without any, memory that is dirty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tplaunch.parallel import grouped
from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.experts import Groups
from tplaunch.parallel.grouped import add_group_bias, grouped_columns, grouped_row

H, F = 6, 10
SIZES = [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [4, 4, 4, 4]]


def groups(sizes: list[int]) -> Groups:
    return Groups(torch.tensor(sizes), sum(sizes))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_meets_its_experts_matrix(sizes: list[int]) -> None:
    x, y = draw(sum(sizes), H), draw(sum(sizes), F)
    gate, up = draw(len(sizes) * H, F), draw(len(sizes) * H, F)
    rows, each = x.split(sizes), gate.chunk(len(sizes))
    first, second = grouped_columns(x, groups(sizes), gate, up)
    torch.testing.assert_close(first, torch.cat([a @ b for a, b in zip(rows, each, strict=True)]))
    torch.testing.assert_close(second, grouped_columns(x, groups(sizes), up)[0])
    back = grouped_row(y, groups(sizes), gate)
    torch.testing.assert_close(back, torch.cat([a @ b.t() for a, b in zip(y.split(sizes), each, strict=True)]))


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[1]])
def test_gradients(sizes: list[int]) -> None:
    x, gate, up, activated = draw(sum(sizes), H), draw(4 * H, F), draw(4 * H, F), draw(sum(sizes), F)
    assert gradcheck(lambda x, gate, up: grouped_columns(x, groups(sizes), gate, up), (x, gate, up))
    assert gradcheck(lambda y, down: grouped_row(y, groups(sizes), down), (activated, gate))
    bias, weights = draw(4, H), draw(sum(sizes))
    assert gradcheck(lambda x, bias: add_group_bias(x, groups(sizes), bias), (x, bias))
    assert gradcheck(lambda x, bias, w: add_group_bias(x, groups(sizes), bias, w), (x, bias, weights))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("narrow", [False, True])
def test_gradients_are_added_up_in_dirty_memory(sizes: list[int], narrow: bool) -> None:
    """The first addition of a step writes over what the last has left, also where an expert had no row."""
    dtype = torch.bfloat16 if narrow else torch.float32
    x, y = torch.randn(sum(sizes), H).to(dtype), torch.randn(sum(sizes), F).to(dtype)
    weights = [torch.randn(4 * H, F).to(dtype).requires_grad_() for _ in range(3)]
    for weight in weights:
        weight.accumulator = Accumulator(torch.full((4 * H, F), torch.nan))  # type: ignore[attr-defined]

    def run(ws: list[Tensor], factor: float) -> None:
        gate, up = grouped_columns(x.clone().requires_grad_(), groups(sizes), *ws[:2])
        out = grouped_row(y.clone().requires_grad_(), groups(sizes), ws[2])
        (factor * (gate.sum() + 2 * up.sum() + 3 * out.sum())).backward()

    plain = [weight.detach().clone().requires_grad_() for weight in weights]
    for factor in (1.0, 2.0):
        run(weights, factor)
        run(plain, factor)
    for weight, expected in zip(weights, plain, strict=True):
        assert weight.grad is None and expected.grad is not None
        total = weight.accumulator.total  # type: ignore[attr-defined]
        torch.testing.assert_close(total, expected.grad.float(), rtol=2e-2 if narrow else 1e-5, atol=1e-5)


def test_no_row_is_left_as_memory_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.empty` gives may hold anything: here not-a-numbers."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    for sizes in SIZES:
        x, weight = draw(sum(sizes), H), draw(4 * H, F)
        (made,) = grouped_columns(x, groups(sizes), weight)
        made.sum().backward()
        assert x.grad is not None and weight.grad is not None
        assert made.isfinite().all() and x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[1], SIZES[3]])
def test_the_kernel_of_a_gpu_is_asked_for_the_same(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has a slow form of it on a CPU, which shows that what it is given is in order."""
    x, y = torch.randn(sum(sizes), 8).bfloat16(), torch.randn(sum(sizes), 16).bfloat16()
    weights = [torch.randn(4 * 8, 16).bfloat16() for _ in range(3)]
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(grouped, "_has_kernel", lambda *_, kernel=kernel: kernel)
        leaves = [t.clone().requires_grad_() for t in (x, y, *weights)]
        first, second = grouped_columns(leaves[0], groups(sizes), *leaves[2:4])
        out = grouped_row(leaves[1], groups(sizes), leaves[4])
        (first.sum() + 2 * second.square().sum() + out.square().sum()).backward()
        found.append([first, second, out, *(leaf.grad for leaf in leaves)])
    for by_loop, by_kernel in zip(*found, strict=True):
        torch.testing.assert_close(by_kernel, by_loop, rtol=2e-2, atol=2e-2)
