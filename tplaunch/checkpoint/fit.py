"""Whether a checkpoint's model is the one that a recipe asks for. Torch-free: the launcher asks before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tplaunch.recipe.schema import Model, RopeScaling

# Only names, and how weights are drawn that a checkpoint brings along.
_IRRELEVANT = frozenset({"preset", "family", "init_std"})
# What weights alone do not depend on: a new run may take them over and compute otherwise (a longer context, say).
_NOT_IN_WEIGHTS = frozenset(
    {"norm_eps", "rope_theta", "rope_scaling", "window", "window_layers", "window_rope_theta", "attention_softcap"}
    | {"logit_softcap", "attention_scale"}
)


def model_differences(
    stored: Mapping[str, Any], asked: Model, *, weights_only: bool = False
) -> list[tuple[str, Any, Any]]:
    """The fields of the model that keep a checkpoint from going on.

    Args:
        stored: the checkpoint's model, as plain data; fields that its version did not know have their defaults.
        asked: the recipe's.
        weights_only: only its weights are taken over, by a new run.

    Returns:
        (key such as "model.num_layers", stored value, asked value) of each that differs.
    """
    left_out = _IRRELEVANT | _NOT_IN_WEIGHTS if weights_only else _IRRELEVANT
    ours = asked.model_dump(mode="json", exclude=set(left_out))
    theirs = {name: stored.get(name, Model.model_fields[name].default) for name in ours}
    if isinstance(scaling := theirs.get("rope_scaling"), Mapping):
        theirs["rope_scaling"] = {name: field.default for name, field in RopeScaling.model_fields.items()} | {**scaling}
    return [(f"model.{name}", theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]]
