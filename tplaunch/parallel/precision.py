"""The dtypes of a precision: storage of what is kept (master weights, gradients, optimizer state), and compute."""

from __future__ import annotations

import torch

from tplaunch.recipe.schema import Precision

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
