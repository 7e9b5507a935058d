"""The residual stream."""

from __future__ import annotations

import torch
from torch import Tensor


def added(x: Tensor, made: Tensor, multiplier: float) -> Tensor:
    """The stream, with what attention or an MLP has made, times Granite's `residual_multiplier`."""
    return x + made if multiplier == 1.0 else torch.add(x, made, alpha=multiplier)
