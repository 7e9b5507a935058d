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

_BF16 = 2**-8  # a change of a number of bf16 by less than this part of it, or half of that, is rounded away


def optimizer_problems(recipe: Recipe) -> Iterator[Problem]:
    optimizer = recipe.optimizer
    if optimizer.name != "sgd" and max(optimizer.betas) >= 1:
        yield Problem("each beta must be below 1", fix="the usual values are [0.9, 0.95]", key="optimizer.betas")
    if optimizer.name == "muon" and optimizer.momentum == 1:
        why = "the running mean of gradients would stay 0"
        yield Problem("must be below 1", why=why, fix="the usual value is 0.95", key="optimizer.momentum")
    precision = recipe.training.precision
    if optimizer.state_dtype == "bf16" and (optimizer.name == "sgd" or precision == "fp64"):
        why = "sgd's momentum is kept as torch keeps it" if optimizer.name == "sgd" else "fp64 runs keep all in fp64"
        yield Problem("bf16 is for adamw and muon", why=why, fix="state_dtype: fp32", key="optimizer.state_dtype")
    if optimizer.gradient_dtype == "bf16" and (optimizer.name != "adamw" or precision != "bf16"):
        why = f"{optimizer.name} updates in its gradients" if optimizer.name != "adamw" else ""
        yield Problem(
            f"bf16 is for adamw and training.precision bf16, not for {optimizer.name} and {precision}",
            why=why,
            fix="gradient_dtype: fp32",
            key="optimizer.gradient_dtype",
        )
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
    if optimizer.state_dtype == "bf16" and optimizer.name != "sgd" and 1 - max(optimizer.betas) < _BF16:
        yield Problem(
            f"bf16 cannot follow moments that change by {1 - max(optimizer.betas):.2g} of themselves a step",
            why="a number of bf16 has 8 bits: a change by less than 1/512 of it is rounded away, and it never falls",
            fix="betas of at most 0.996, or state_dtype: fp32",
            key="optimizer.state_dtype",
        )
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
