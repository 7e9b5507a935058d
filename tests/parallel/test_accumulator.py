"""Gradients that are added up in place."""

from __future__ import annotations

import pytest
import torch

from tplaunch.parallel.accumulator import Accumulator, add_products, merge


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_begins_anew_and_adds_up(dtype: torch.dtype) -> None:
    total = Accumulator(torch.full((4, 3), torch.nan, dtype=dtype))
    for _ in range(2):  # steps
        products = [(draw(4, 5), draw(5, 3)) for _ in range(3)]
        for a, b in products:
            total.add_product(a, b)
        total.finish()
        torch.testing.assert_close(total.total, sum(a @ b for a, b in products).to(dtype))


def test_a_step_without_an_addition_is_zero() -> None:
    total = Accumulator(torch.full((2, 2), torch.nan))
    total.finish()
    assert not total.total.any()


def test_rows_are_added_to_their_own_each_as_often_as_it_comes() -> None:
    total = Accumulator(torch.full((4, 2), torch.nan))
    total.add_rows(torch.tensor([1, 3, 1]), torch.ones(3, 2))
    total.add_rows(torch.tensor([3]), torch.ones(1, 2))
    assert total.total.tolist() == [[0, 0], [2, 2], [0, 0], [2, 2]]


def test_neighbours_in_memory_are_one_matrix() -> None:
    storage = torch.arange(2400.0).view(800, 3)
    first, second, third = storage[100:300], storage[300:400], storage[400:800]
    (whole,) = merge([first, second, third])
    assert torch.equal(whole, storage[100:]) and whole.data_ptr() == first.data_ptr()
    for apart in ([first, third], [second, first], [first, second.clone()], [first, storage[300:500, :2]]):
        assert merge(apart) is apart


@pytest.mark.parametrize("together", [True, False])
def test_products_of_several(together: bool) -> None:
    storage = draw(6, 3)
    parts = [storage[:4], storage[4:] if together else draw(2, 3)]
    accumulators = [Accumulator(part) for part in parts]
    expected = torch.zeros_like(storage)
    for _ in range(2):
        left, right = draw(6, 5), draw(5, 3)
        expected += left @ right
        add_products(accumulators, [left] if together else [left[:4], left[4:]], right)
    torch.testing.assert_close(torch.cat([a.total for a in accumulators]), expected)
