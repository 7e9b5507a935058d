"""A few rows times a weight, the one way and the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tplaunch.kernels.matmul import linear


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (4, 1), (8, 1), (9, 1), (2, 3)])
@pytest.mark.parametrize(("out", "width"), [(512, 160), (160, 512), (20, 16)])
def test_it_is_a_linear_layer(shape: tuple[int, ...], out: int, width: int) -> None:
    random = torch.Generator().manual_seed(len(shape) + out)
    x, weight = (torch.randn(*size, width, generator=random) for size in (shape, (out,)))
    found, expected = linear(x, weight), F.linear(x.double(), weight.double())
    assert found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_narrower_view_of_the_input() -> None:
    x, weight = torch.randn(3, 1, 700)[..., 100:612], torch.randn(600, 512)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
