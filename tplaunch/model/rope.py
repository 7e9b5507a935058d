"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half layout of Hugging Face."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tplaunch.kernels import fused
from tplaunch.parallel.function import Function
from tplaunch.recipe.schema import Model, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """fp32 [head_dim / 2].

    Computed in fp32 as transformers does, so that a model moves between the two unchanged.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    if scaling.type == "yarn":
        stays = 1 - _yarn_ramp(head_dim, theta, scaling)
        return 1.0 / (scaling.factor * theta**exponents) * (1 - stays) + frequencies * stays
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    low = turns < scaling.low_freq_factor
    high = turns > scaling.high_freq_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of the scaled frequency each has, from 0, where it turns `beta_fast` times, to 1, where it turns
    `beta_slow` times (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""

    def number(turns: float) -> float:
        """Of the frequency that turns so often."""
        return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Factor of cos and sin: of YaRN's temperature, once for queries and once for keys."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _grown(scaling, scaling.mscale) / _grown(scaling, scaling.mscale_all_dim)
    return _grown(scaling, 1.0)


def _grown(scaling: RopeScaling, weight: float) -> float:
    return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def rope_table(model: Model, positions: Tensor, dtype: torch.dtype, *, window: bool = False) -> Tensor:
    """cos and sin of every position and frequency.

    Args:
        positions: int [s].
        window: for layers with a window, where they have their own `window_rope_theta`.
        dtype: fp32, or fp64 for a run in fp64.

    Returns:
        [2, s, 1, 1, rotary_dim]: cos, sin, each frequency twice (rotate-half layout).
    """
    theta, scaling = model.rope_theta, model.rope_scaling
    if window and model.window_rope_theta is not None:
        theta, scaling = model.window_rope_theta, None
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies(model.rotary_dim, theta, scaling).to(
        positions.device
    )
    angles = torch.cat([angles, angles], dim=-1)
    table = torch.stack([angles.cos(), angles.sin()]) * attention_factor(scaling)
    return table.to(dtype)[:, :, None, None, :]


def still_table(model: Model, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `rope_table`, [2, 1, 1, 1, rotary_dim], of layers that turn nothing: so every layer has the same steps, and
    keeps the same."""
    zeros = torch.zeros(model.rotary_dim, device=device, dtype=dtype)
    return torch.stack([zeros.cos(), zeros])[:, None, None, None, :]


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate [s, b, heads, head_dim] by a table [2, s, 1 or b, 1, rotary_dim], in the table's precision; channels
    beyond the table's stay."""
    return _rotated(x, table) if torch.compiler.is_compiling() else _Rotate.apply(x, table)


def split_heads(projected: Tensor, sizes: list[int], head_dim: int, table: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values, or some of them, out of their common projection; all but the last, the values, rotated
    where there is a table.

    One function instead of a split and two rotations: the backward pass writes each gradient to its place in the
    gradient of the projection.

    Args:
        projected: [s, b, features].
        sizes: features of each.
        table: as for `apply_rope`, or None.

    Returns:
        [s, b, heads, head_dim] of each.
    """
    if torch.compiler.is_compiling():  # which sees the same, and makes kernels of it
        heads = [part.unflatten(-1, (-1, head_dim)) for part in projected.split(sizes, -1)]
        return (*(_rotated(head, table) for head in heads[:-1]), heads[-1]) if table is not None else tuple(heads)
    return _SplitHeads.apply(projected, sizes, head_dim, table)


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """`apply_rope` in words that a compiler reads."""
    cos, sin = table.unbind(0)
    turned, stays = x.to(table.dtype).tensor_split([table.shape[-1]], -1)
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, stays], -1).to(x.dtype)


def _rotate(x: Tensor, table: Tensor, out: Tensor, *, back: bool) -> None:
    """Write [s, b, heads, head_dim], rotated or rotated back, to `out` of the same shape."""
    if fused.fits(x):
        fused.rotate(x, table, out, heads=x.shape[2], back=back)
        return
    cos, sin = table.unbind(0)
    if (turned := table.shape[-1]) < x.shape[-1]:
        out[..., turned:].copy_(x[..., turned:])
        x, out = x[..., :turned], out[..., :turned]
    half = x.shape[-1] // 2
    wide = x.to(table.dtype)
    total = torch.mul(wide, cos, out=out) if out.dtype == table.dtype else wide * cos
    sign = -1 if back else 1
    total[..., :half].addcmul_(wide[..., half:], sin[..., half:], value=-sign)
    total[..., half:].addcmul_(wide[..., :half], sin[..., :half], value=sign)
    if total is not out:
        out.copy_(total)


def turn_pairs(x: Tensor, table: Tensor, out: Tensor, *, back: bool) -> None:
    """Write [s, b, heads, rotary_dim], rotated or rotated back, to `out` of the same shape, by pairs of neighbours
    where `apply_rope` has one half of the channels beside the other."""
    cos, sin = table[..., : table.shape[-1] // 2].unbind(0)
    if back:
        sin = -sin
    even, odd = x.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    places = out.unflatten(-1, (-1, 2))
    places[..., 0].copy_(even * cos - odd * sin)
    places[..., 1].copy_(odd * cos + even * sin)


class _Rotate(Function):
    """The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _rotate(x, table, out, back=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _rotate(grad, table, out, back=True)
        return out, None


class _SplitHeads(Function):
    """See `split_heads`."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, sizes: list[int], head_dim: int, table: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        ctx.save_for_backward(*([] if table is None else [table]))
        if table is None:
            return tuple(part.unflatten(-1, (-1, head_dim)) for part in projected.split(sizes, -1))
        out = torch.empty_like(projected)
        heads, places = (x.unflatten(-1, (-1, head_dim)) for x in (projected, out))
        turned = sum(sizes[:-1]) // head_dim
        if fused.fits(projected):
            fused.rotate(heads, table, places, heads=turned, back=False)
        else:
            _rotate(heads[:, :, :turned], table, places[:, :, :turned], back=False)
            places[:, :, turned:].copy_(heads[:, :, turned:])
        return tuple(part.unflatten(-1, (-1, head_dim)) for part in out.split(sizes, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        tables = ctx.saved_tensors  # none or one
        queries = grads[0]
        out = queries.new_empty((*queries.shape[:2], sum(ctx.sizes)))
        places = [
            part.unflatten(-1, grad.shape[2:]) for part, grad in zip(out.split(ctx.sizes, -1), grads, strict=True)
        ]
        for number, (grad, place) in enumerate(zip(grads, places, strict=True)):
            if tables and number < len(places) - 1:
                _rotate(grad, tables[0], place, back=True)
            else:
                place.copy_(grad)
        return out, None, None, None
