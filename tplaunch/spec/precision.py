"""Bytes of an element, by precision. Torch-free."""

from __future__ import annotations

from tplaunch.recipe.schema import Precision, Recipe

COMPUTE_BYTES: dict[Precision, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
STORAGE_BYTES: dict[Precision, int] = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}  # weights kept, gradients reduced


def state_bytes(recipe: Recipe) -> int:
    """Bytes of an element of the optimizer's state."""
    return 2 if recipe.optimizer.state_dtype == "bf16" else STORAGE_BYTES[recipe.training.precision]
