"""Both ways of multiplying give one product, of any number of tokens."""

from __future__ import annotations

import pytest
import torch

from tplaunch.kernels import matmul as kernels
from tplaunch.kernels.matmul import add_over_tokens, matmul, matmul_into, over_tokens

TOKENS = [0, 1, 31, 32, 33, 200, 256]


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def used(request, monkeypatch):
    """Which library multiplies; the number of calls of oneDNN so far."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls = []
    multiply = kernels.onednn_linear
    monkeypatch.setattr(kernels, "_onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(kernels, "onednn_linear", lambda *two: calls.append(1) or multiply(*two))
    return lambda tokens: len(calls) == (request.param and tokens >= 32)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_times_a_matrix(used, tokens, transposed):
    x = torch.randn(tokens, 48)
    matrix = torch.randn(72, 48).t() if transposed else torch.randn(48, 72)
    expected = x.double() @ matrix.double()
    close(matmul(x, matrix), expected)
    assert used(tokens)
    wide = torch.full((tokens, 100), 3.0)
    matmul_into(wide[:, :72], x, matrix)
    close(wide[:, :72], expected)
    matmul_into(wide[:, :72], x, matrix, add=True)
    close(wide[:, :72], 2 * expected)
    assert (wide[:, 72:] == 3.0).all()


def test_leading_dimensions_and_strides_stay(used):
    x, matrix = torch.randn(40, 3, 96)[:, :, 16:64], torch.randn(48, 8)
    close(matmul(x, matrix), x.double() @ matrix.double())
    assert used(120)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_gradient_by_itself(used, tokens):
    grad, x = torch.randn(tokens, 90), torch.randn(tokens, 48)
    close(over_tokens(grad.t(), x), grad.double().t() @ x.double())
    assert used(tokens)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_gradient_is_added_up(used, tokens, monkeypatch):
    monkeypatch.setattr(kernels, "_PIECE", 48 * 80)  # in pieces of which the last one is shorter
    grad, x = torch.randn(tokens, 90), torch.randn(tokens, 48)
    expected = grad.double().t() @ x.double()
    total = torch.full((90, 48), torch.nan)
    add_over_tokens(total, grad.t(), x, begun=False)
    close(total, expected)
    add_over_tokens(total, grad.t(), x, begun=True)
    close(total, 2 * expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "onednn_linear", None)
    x, matrix = torch.randn(64, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype)
    assert torch.equal(matmul(x, matrix), x @ matrix)


@pytest.mark.parametrize(
    ("maker", "capability", "faster"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_which_cpu_has_it(monkeypatch, maker, capability, faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(kernels, "_maker", lambda: maker)
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert kernels._onednn_is_faster.__wrapped__() == (faster and both)


@pytest.mark.parametrize("tokens", [(2, 2), (4, 16), (3, 16)])
def test_products_are_no_views(used, tokens):
    """Which an autograd function must not give, where somebody adds to it in place."""
    x, weight = torch.randn(*tokens, 512), torch.randn(160, 512)
    assert not kernels.linear(x, weight)._is_view() and not matmul(x, weight.t())._is_view()
