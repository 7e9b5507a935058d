"""What updates each parameter, with which rate and decay: by its role and the recipe's groups. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from tplaunch.recipe.schema import Optimizer, ParameterGroup, Recipe
from tplaunch.spec.parameters import Parameter

Kind = Literal["adamw", "sgd", "muon"]

_DECAYED = frozenset({"matrix", "expert", "router", "embedding", "position", "output", "adapter"})
_HIDDEN = frozenset({"matrix", "expert"})  # of Muon; the rest is AdamW's (Jordan 2024; Moonlight, arXiv 2502.16982)


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike.

    Args:
        name: in metrics, `lr_<name>`; groups of one name have one rate.
        kind: what updates them.
        factor: of the run's learning rate.
        weight_decay: theirs.
    """

    name: str
    kind: Kind
    factor: float
    weight_decay: float


def is_hidden(parameter: Parameter) -> bool:
    """Whether it is a matrix inside of a block, which Muon updates."""
    return parameter.role in _HIDDEN


def rule_of(settings: Optimizer, name: str) -> int | None:
    """Which of the recipe's groups a parameter is in, by its global name: the first that matches; None: in none."""
    return next((number for number, rule in enumerate(settings.groups) if fnmatchcase(name, rule.match)), None)


def group_of(settings: Optimizer, parameter: Parameter) -> Group:
    """The group of a parameter that is trained."""
    kind: Kind = settings.name
    if kind == "muon" and not is_hidden(parameter):
        kind = "adamw"
    decayed = parameter.role in _DECAYED
    number = rule_of(settings, parameter.name)
    rule = ParameterGroup(match="*") if number is None else settings.groups[number]
    name = "muon" if kind == "muon" else "decay" if decayed else "no_decay"
    decay = rule.weight_decay
    if decay is None:
        decay = settings.weight_decay if decayed else 0.0
    factor = 1.0 if rule.lr is None else rule.lr / settings.lr
    return Group(name if number is None else f"group_{number + 1}", kind, factor, decay)


def groups_of(settings: Optimizer, parameters: Iterable[Parameter]) -> list[Group]:
    """The groups of some parameters, those that are decayed first."""
    found = dict.fromkeys(group_of(settings, parameter) for parameter in parameters if parameter.trained)
    return sorted(found, key=lambda group: group.weight_decay == 0.0)


def slots(settings: Optimizer, kind: Kind) -> tuple[str, ...]:
    """Names of the state tensors that each parameter of a kind has, in torch's words."""
    if kind == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if kind == "muon" or settings.momentum else ()


def all_slots(settings: Optimizer) -> tuple[str, ...]:
    """Names of the state tensors of all kinds of parameters."""
    kinds: tuple[Kind, ...] = ("adamw", "muon") if settings.name == "muon" else (settings.name,)
    return tuple(name for kind in kinds for name in slots(settings, kind))


def kept_in_words(recipe: Recipe) -> str:
    """What is kept beside the weights otherwise than usual, in words that follow the precision; else ""."""
    optimizer = recipe.optimizer
    found = {
        "moments in bf16": optimizer.state_dtype == "bf16",
        "gradients in bf16": optimizer.gradient_dtype == "bf16",
        "averages": recipe.training.ema is not None,
    }
    return "".join(f", {words}" for words, is_so in found.items() if is_so)
