"""Adapters: what they cannot belong to, and what they stand on."""

from __future__ import annotations

from collections.abc import Iterator

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Lora, Recipe
from tplaunch.spec.lora import is_target, targets
from tplaunch.spec.parameters import Parameter, parameter_shapes

_PROJECTIONS = ("wq", "wk", "wv")


def lora_problems(recipe: Recipe) -> Iterator[Problem]:
    lora = recipe.lora
    if lora is None:
        return
    if recipe.optimizer.name == "muon":
        why = "it orthogonalises whole matrices, and adapters are the factors of some"
        yield Problem("muon cannot train adapters", why=why, fix="optimizer.name: adamw", key="optimizer.name")
    if recipe.checkpoint.export_every is not None:
        yield Problem(
            "a run that trains adapters exports none while it trains",
            why="PEFT's folders, and merged models, are made of checkpoints afterwards",
            fix="leave it out, and use `tplaunch export`",
            key="checkpoint.export_every",
        )
    asked = targets(lora)
    if recipe.model.latent is not None and (refused := [name for name in asked if name in _PROJECTIONS]):
        yield Problem(
            f"{', '.join(refused)} cannot have adapters in a model with latent attention",
            why="its queries, keys and values are made of latents, which have no adapters yet",
            fix=f"targets: [{', '.join(name for name in asked if name not in _PROJECTIONS) or 'wo'}]",
            key="finetune.lora.targets",
        )
    elif lora.targets != "all-linear":
        yield from _missing(recipe, lora)


def _missing(recipe: Recipe, lora: Lora) -> Iterator[Problem]:
    """Targets that no matrix is."""
    try:
        parameters = parameter_shapes(recipe.model)
    except (ValueError, AssertionError):
        return  # the model is wrong, which is told elsewhere
    for name in targets(lora):
        one = lora.model_copy(update={"targets": [name]})
        if not any(is_target(one, parameter) for parameter in parameters):
            experts = any(_is_experts(parameter, name) for parameter in parameters)
            yield Problem(
                f"no matrix that can have an adapter is called {name}",
                why="those of experts stay frozen, and so does the router" if experts else "",
                fix=f"leave {name} out",
                key="finetune.lora.targets",
            )


def _is_experts(parameter: Parameter, name: str) -> bool:
    return parameter.role == "expert" and parameter.name.endswith(f".{name}.weight")


def missing_base(recipe: Recipe) -> Iterator[Problem]:
    """Adapters without a trained model beneath them."""
    if recipe.lora is not None and recipe.checkpoint.initial is None:
        yield Problem(
            "adapters need a trained model beneath them",
            why="without checkpoint.initial they would be trained beside random weights that stay random",
            fix="checkpoint.initial: a checkpoint, or a Hugging Face folder",
            key="finetune.lora",
        )
