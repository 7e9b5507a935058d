"""Whether a checkpoint's model is the one that a recipe asks for. Torch-free: the launcher asks before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Experts, Latent, Lora, Model, Optimizer, RopeScaling, Section
from tplaunch.spec.optimizer import all_slots

# Only names, and how weights are drawn that a checkpoint brings along.
_IRRELEVANT = frozenset({"preset", "family", "init_std"})
# What weights alone do not depend on: a new run may take them over and compute otherwise (a longer context, say).
_NOT_IN_WEIGHTS = frozenset(
    {"norm_eps", "rope_theta", "rope_scaling", "window", "window_layers", "window_rope_theta", "attention_softcap"}
    | {"logit_softcap", "attention_scale"}
)
# Of experts, what training adds to the loss: like a learning rate.
_LOSSES = frozenset({"aux_loss", "z_loss"})
_SECTIONS: dict[str, type[Section]] = {"rope_scaling": RopeScaling, "moe": Experts, "latent": Latent}


def model_differences(
    stored: Mapping[str, Any], asked: Model, *, weights_only: bool = False, moves: Collection[str] = ()
) -> list[tuple[str, Any, Any]]:
    """The fields of the model that keep a checkpoint from going on.

    Args:
        stored: the checkpoint's model, as plain data; fields that its version did not know have their defaults.
        asked: the recipe's.
        weights_only: only its weights are taken over, by a new run.
        moves: fields that stages of the run may change.

    Returns:
        (key such as "model.num_layers", stored value, asked value) of each that differs.
    """
    left_out = {*_IRRELEVANT, *moves, *(_NOT_IN_WEIGHTS if weights_only else ())}
    ours = asked.model_dump(mode="json", exclude=left_out)
    theirs = {name: _complete(name, stored.get(name, Model.model_fields[name].default)) for name in ours}
    found = []
    for name in ours:
        if name == "moe" and theirs[name] is not None and ours[name] is not None:
            found += _expert_differences(theirs[name], ours[name])
        elif theirs[name] != ours[name]:
            found.append((f"model.{name}", theirs[name], ours[name]))
    return found


def _complete(name: str, value: Any) -> Any:
    """A value of a field of the model; of a section that was written with fewer fields, with the defaults of these."""
    if name not in _SECTIONS or not isinstance(value, Mapping):
        return value
    return {key: field.default for key, field in _SECTIONS[name].model_fields.items()} | {**value}


def _expert_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The same of two models with experts, by field. A correction may move at another rate, but not come or go."""
    found = []
    for name in ours:
        same = theirs[name] == ours[name] or name in _LOSSES
        if name == "bias_rate":
            same = (theirs[name] is None) == (ours[name] is None)
        if not same:
            found.append((f"model.moe.{name}", theirs[name], ours[name]))
    return found


def adapter_differences(stored: Mapping[str, Any] | None, asked: Lora | None) -> list[tuple[str, Any, Any]]:
    """The same of adapters: what keeps those of a checkpoint from going on as those of a recipe.

    Args:
        stored: the checkpoint's `finetune.lora`, as plain data; None: it is a whole model.
    """
    ours = None if asked is None else asked.model_dump(mode="json")
    theirs = None if stored is None else {**stored}
    if ours is None or theirs is None:
        return [] if ours is theirs else [("finetune.lora", theirs, ours)]
    return [(f"finetune.lora.{name}", theirs.get(name), ours[name]) for name in ours if theirs.get(name) != ours[name]]


def missing_state(about: Mapping[str, Any], optimizer: Optimizer) -> list[str]:
    """What an optimizer keeps of each parameter, and a checkpoint does not have.

    Args:
        about: what its manifest says.
    """
    stored = set(about["optimizer_state"])
    if about.get("optimizer") == "muon" != optimizer.name:
        stored = set()  # of matrices it has Muon's, of all else AdamW's
    return sorted(set(all_slots(optimizer)) - stored)


def refuse_adapters(path: object, about: Mapping[str, Any]) -> list[Problem]:
    """Why a run cannot start from a checkpoint: there is no whole model in it."""
    if about.get("lora") is None:
        return []
    fix = "make a whole model of it: `tplaunch export --merge`, and name that folder"
    return [Problem(f"{path} holds adapters alone, not a model to start from", fix=fix, key="checkpoint.initial")]
