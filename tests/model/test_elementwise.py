"""The element-wise autograd functions of a block against torch's own operations, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from tplaunch.kernels.fused import Kind
from tplaunch.model.gated import gated, side_by_side
from tplaunch.model.norm import RMSNorm, _RMSNorm
from tplaunch.model.rope import apply_rope, split_heads

S, B, HEADS, KV, DIM = 5, 2, 3, 1, 8
SIZES = [HEADS * DIM, KV * DIM, KV * DIM]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def table(dtype: torch.dtype, batch: int = 1) -> Tensor:
    angles = torch.randn(S, batch, 1, DIM // 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def reference_rope(x: Tensor, rope: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-right, left], -1) * rope[1]


def reference_heads(projected: Tensor, rope: Tensor | None) -> list[Tensor]:
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in projected.split(SIZES, -1))
    return [q, k, v] if rope is None else [reference_rope(q, rope), reference_rope(k, rope), v]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("batch", [1, B])
def test_rotation(batch: int) -> None:
    x, rope = draw(S, B, HEADS, DIM), table(torch.float64, batch)
    torch.testing.assert_close(apply_rope(x, rope), reference_rope(x, rope))
    assert gradcheck(lambda x: apply_rope(x, rope), (x,))
    across = x.transpose(0, 2).contiguous().transpose(0, 2)  # as attention's gradients lie
    torch.testing.assert_close(apply_rope(across, rope), reference_rope(x, rope))


@pytest.mark.parametrize("rotated", [True, False])
def test_heads_of_a_common_projection(rotated: bool) -> None:
    projected, rope = draw(S, B, sum(SIZES)), table(torch.float64) if rotated else None
    for ours, theirs in zip(split_heads(projected, SIZES, DIM, rope), reference_heads(projected, rope), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert gradcheck(lambda x: split_heads(x, SIZES, DIM, rope), (projected,))


def test_a_projection_in_bf16_is_rotated_in_fp32() -> None:
    projected, rope = draw(S, B, sum(SIZES), dtype=torch.bfloat16), table(torch.float32)
    q, k, v = split_heads(projected, SIZES, DIM, rope)
    expected = reference_heads(projected.float(), rope)
    for ours, theirs in zip((q, k, v), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    (grad,) = torch.autograd.grad([q, k, v], projected, [torch.ones_like(x) for x in (q, k, v)])
    (wide,) = torch.autograd.grad(expected, projected, [torch.ones_like(x) for x in expected])
    torch.testing.assert_close(grad, wide, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("piece", [None, 4, 8])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_gated_activations(kind: Kind, piece: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if piece is not None:  # of so many elements, some rows of experts at a time
        monkeypatch.setattr("tplaunch.model.gated._PIECE", piece)
    x = (4 * torch.randn(2, 3, 8, dtype=torch.float64)).requires_grad_()
    gate, up = x.chunk(2, -1)
    low = gate.clamp(max=7)
    expected = {
        "swiglu": F.silu(gate) * up,
        "geglu": F.gelu(gate, approximate="tanh") * up,
        "swiglu_clamped": low * torch.sigmoid(1.702 * low) * (up.clamp(-7, 7) + 1),
    }[kind]
    torch.testing.assert_close(side_by_side(x, kind), expected)
    assert gradcheck(partial(side_by_side, kind=kind), (x,))
    rows, weights = x.detach().flatten(0, 1).requires_grad_(), torch.rand(6, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(gated(*rows.chunk(2, -1), weights, kind), expected.flatten(0, 1) * weights.unsqueeze(-1))
    assert gradcheck(lambda rows, weights: gated(*rows.chunk(2, -1), weights, kind), (rows, weights))


def test_rms_norm() -> None:
    x, weight = draw(S, B, DIM), draw(DIM)
    ours: Callable[..., Any] = lambda x, weight: _RMSNorm.apply(x.view_as(x), weight.view_as(weight), 1e-3)  # noqa: E731
    torch.testing.assert_close(ours(x, weight), F.rms_norm(x, (DIM,), weight, 1e-3))
    assert gradcheck(ours, (x, weight))


def test_the_module_is_that_function_on_a_cpu() -> None:
    """`F.rms_norm` gives the same numbers, and keeps more of them."""
    x, module = draw(S, B, DIM), cast(Any, SimpleNamespace(weight=draw(DIM), eps=1e-3, plus_one=False))
    ours = RMSNorm.forward(module, x)
    assert type(ours.grad_fn) is _RMSNorm._backward_cls
    torch.testing.assert_close(ours, F.rms_norm(x, (DIM,), module.weight, 1e-3))


def test_rms_norm_by_one_and_the_weight() -> None:
    x, weight = draw(S, B, DIM), draw(DIM)
    assert gradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-3, True), (x.view_as(x), weight.view_as(weight)))
    narrow = [t.detach().to(torch.bfloat16) for t in (x, weight)]
    wide = F.rms_norm(narrow[0].float(), (DIM,), 1 + narrow[1].float(), 1e-3)  # not rounded before it is multiplied
    assert torch.equal(_RMSNorm.apply(*narrow, 1e-3, True), wide.to(torch.bfloat16))


def test_rms_norm_in_bf16_is_torchs_and_keeps_its_input_alone() -> None:
    x, weight = draw(S, B, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours = _RMSNorm.apply(x.view_as(x), weight.view_as(weight), 1e-5)
    theirs = F.rms_norm(x, (64,), weight, 1e-5)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    assert sorted(t.numel() * t.element_size() for t in kept) == [S * B * 4, 64 * 2, S * B * 64 * 2]
    grad = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)
