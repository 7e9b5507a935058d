"""Names of what validation measures: `validation/[NAME/][ema/]FIGURE`. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from tplaunch.recipe.schema import Recipe

Figure = Literal["loss", "perplexity", "bits_per_byte"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # of a set, so that it is one part of a metric's name
RESERVED = ("ema", "path", "steps", "weight")
_LOSS = re.compile(r"validation/(?:[^/]+/){0,2}loss")


def metric(name: str, figure: Figure, *, ema: bool = False) -> str:
    """The metric of a set of validation data.

    Args:
        name: of the set; "" where the recipe gives none.
        ema: of the averaged weights.
    """
    return "/".join(part for part in ("validation", name, "ema" if ema else "", figure) if part)


def is_loss(key: str) -> bool:
    """Whether a metric is a validation loss."""
    return _LOSS.fullmatch(key) is not None


def losses(keys: Iterable[str]) -> dict[str, str]:
    """The validation losses among metrics, each with its name in words: "validation", "validation wiki"."""
    found = sorted(key for key in keys if is_loss(key))
    return {key: key.removesuffix("/loss").replace("/", " ") for key in found}


def validation_losses(recipe: Recipe) -> list[str]:
    """The losses that a recipe's validations will measure."""
    training = recipe.training
    if not training.eval_every:
        return []
    weights = (False, True) if training.ema is not None else (False,)
    return [metric(one.name, "loss", ema=ema) for ema in weights for one in recipe.data.validation_sets()]
