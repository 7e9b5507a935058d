"""The gradient norm is that of exact arithmetic, whatever the number of elements and however they are cut."""

from __future__ import annotations

import pytest
import torch

from tplaunch.optim.gradients import square_sum


@pytest.mark.parametrize("rows", [1, 4, 4096])
def test_squares_are_summed_wide(rows: int) -> None:
    whole = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(1))
    exact = whole.double().square().sum().item()
    total = square_sum(whole.split(rows))
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(exact, rel=1e-8)


def test_squares_beyond_fp32_and_nothing_at_all() -> None:
    assert square_sum([torch.tensor([3e30, 4e30])]).item() == pytest.approx(25e60, rel=1e-6)
    assert square_sum([torch.tensor([3e-30, 4e-30])]).item() == pytest.approx(25e-60, rel=1e-6, abs=0)
    assert square_sum([torch.empty(0)]).item() == 0.0
    assert square_sum([]).item() == 0.0
    assert square_sum([torch.ones(3, dtype=torch.float64), torch.empty(0), torch.ones(2)]).item() == pytest.approx(5.0)
