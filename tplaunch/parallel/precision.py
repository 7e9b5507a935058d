"""The dtypes of a precision: storage of what is kept (master weights; gradients and optimizer state, where the recipe
asks for no narrower dtype), and compute."""

from __future__ import annotations

import torch

from tplaunch.recipe.schema import Precision, Recipe

STORAGE_DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
}
COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def gradient_dtype(recipe: Recipe) -> torch.dtype:
    """In which gradients are added up (in flat buffers) and reduced."""
    narrow = recipe.optimizer.gradient_dtype == "bf16"
    return torch.bfloat16 if narrow else STORAGE_DTYPE[recipe.training.precision]


def state_dtype(recipe: Recipe) -> torch.dtype:
    """In which the optimizer's state is kept."""
    return torch.bfloat16 if recipe.optimizer.state_dtype == "bf16" else STORAGE_DTYPE[recipe.training.precision]
