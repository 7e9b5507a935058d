"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half layout of Hugging Face."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tplaunch.recipe.schema import Model


def inverse_frequencies(model: Model) -> Tensor:
    """fp32 [head_dim / 2], Llama 3's scaling applied where the model has it.

    Computed in fp32 as transformers does, so that a model moves between the two unchanged.
    """
    assert model.head_dim is not None
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequencies = 1.0 / (model.rope_theta**exponents)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    low = turns < scaling.low_freq_factor
    high = turns > scaling.high_freq_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))


def rope_table(model: Model, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin of every position and frequency.

    Args:
        positions: int [s].
        dtype: fp32, or fp64 for a run in fp64.

    Returns:
        [2, s, 1, 1, head_dim]: cos, sin, each frequency twice (rotate-half layout).
    """
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies(model).to(positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)[:, :, None, None, :]


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate [s, b, heads, head_dim] by a table [2, s, 1 or b, 1, head_dim], in the table's precision."""
    cos, sin = table.unbind(0)
    x_table = x.to(table.dtype)
    left, right = x_table.chunk(2, dim=-1)
    return (x_table * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)
