"""Settings of the optimizer: what contradicts itself, groups that no parameter is in, and what has no effect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Optimizer, Recipe
from tplaunch.spec.lora import adapted
from tplaunch.spec.optimizer import rule_of
from tplaunch.spec.parameters import parameter_shapes


def optimizer_problems(recipe: Recipe) -> Iterator[Problem]:
    optimizer = recipe.optimizer
    if optimizer.name != "sgd" and max(optimizer.betas) >= 1:
        yield Problem("each beta must be below 1", fix="the usual values are [0.9, 0.95]", key="optimizer.betas")
    if optimizer.name == "muon" and optimizer.momentum == 1:
        why = "the running mean of gradients would stay 0"
        yield Problem("must be below 1", why=why, fix="the usual value is 0.95", key="optimizer.momentum")
    if not optimizer.groups:
        return
    names = _names(recipe)
    for number, rule in enumerate(optimizer.groups if names else ()):
        if not any(fnmatchcase(name, rule.match) for name in names):
            near = get_close_matches(rule.match, dict.fromkeys(re.sub(r"\d+", "*", name) for name in names), 3, 0.3)
            yield Problem(
                f"no parameter's name is like {rule.match}",
                fix=f"the nearest are {', '.join(near)}" if near else f"names are such as {names[0]}",
                key=f"optimizer.groups[{number}].match",
            )


def optimizer_warnings(recipe: Recipe) -> Iterator[Problem]:
    optimizer = recipe.optimizer
    if optimizer.momentum and optimizer.name == "adamw":
        yield Problem("has no effect with adamw", fix="betas are its own", key="optimizer.momentum")
    for key in ("betas", "eps"):
        if optimizer.name == "sgd" and getattr(optimizer, key) != Optimizer.model_fields[key].default:
            yield Problem("has no effect with sgd", key=f"optimizer.{key}")
    names = _names(recipe) if optimizer.groups else []
    taken = {rule_of(optimizer, name) for name in names}
    for number, rule in enumerate(optimizer.groups):
        key = f"optimizer.groups[{number}]"
        if rule.lr is None and rule.weight_decay is None:
            yield Problem("changes nothing", fix="give it lr or weight_decay", key=key)
        elif number not in taken and any(fnmatchcase(name, rule.match) for name in names):
            why = "of several groups that match a name, the first has it"
            yield Problem("has no parameters: groups before it have them all", why=why, fix="put it first", key=key)


def _names(recipe: Recipe) -> list[str]:
    """Of all parameters that are trained; none where the model is wrong, which is told elsewhere."""
    try:
        return [p.name for p in adapted(parameter_shapes(recipe.model), recipe.lora) if p.trained]
    except (ValueError, AssertionError):
        return []
