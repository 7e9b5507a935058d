"""Starts a generation on this machine. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.checkpoint.origin import Origin
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError
from tplaunch.generate.prompts import ends_of, prompt_ids
from tplaunch.generate.settings import Settings, read_settings
from tplaunch.launch.helper import run_module
from tplaunch.machine import count_gpus
from tplaunch.recipe.load import LoadedRecipe
from tplaunch.recipe.schema import Model, Recipe


@dataclass(frozen=True)
class Prompts:
    """What a model is given.

    Args:
        ids: token ids of each prompt.
        settings: what the model's folder says of generating.
        ends: tokens after which there are no more.
        warnings: what is likely not meant.
    """

    ids: list[list[int]]
    settings: Settings
    ends: tuple[int, ...]
    warnings: list[str]


def encode(origin: Origin, prompts: Sequence[str], max_tokens: int) -> Prompts:
    """Prompts as token ids.

    Raises:
        TplaunchError: there is no tokenizer, it has more tokens than the model, or a prompt leaves the model no room.
    """
    if origin.tokenizer is None:
        fix = "put its tokenizer.json beside the checkpoint directory"
        raise TplaunchError(Problem(f"no tokenizer is known of {origin.checkpoint}", fix=fix))
    tokenizer = Tokenizer(origin.tokenizer)
    if tokenizer.vocab_size > origin.model.vocab_size:
        what = f"{origin.tokenizer} has {tokenizer.vocab_size} tokens, the model {origin.model.vocab_size}"
        raise TplaunchError(Problem(what, fix="give the tokenizer that it was trained with"))
    found = prompt_ids(tokenizer, prompts)
    limit, longest = origin.model.max_position, max(map(len, found)) + max_tokens
    if limit is not None and longest > limit:
        what = f"{longest} tokens, prompt and all, are more than the {limit} positions of the model"
        raise TplaunchError(Problem(what, fix="fewer --max-tokens, or a shorter prompt", key="--max-tokens"))
    settings = read_settings(origin.tokenizer)
    warnings = []
    if longest > origin.seq_len:
        warnings.append(
            f"{longest:,} tokens, prompt and all, are more than the {origin.seq_len:,} that the model was trained for"
        )
    if settings.other:
        warnings.append(f"of generation_config.json, {', '.join(settings.other)} is not followed")
    return Prompts(found, settings, ends_of(tokenizer, settings), warnings)


def check(origin: Origin, tp: int, pp: int) -> Checked:
    """The model on TP x PP ranks of this machine.

    Raises:
        RecipeError: it cannot be split so, or there are fewer GPUs.
    """
    recipe = Recipe.model_validate(
        {
            "name": "generate",
            "model": origin.model.model_dump(),
            "topology": generation_topology(origin.model, tp, pp),
            "training": {
                "seq_len": origin.seq_len,
                "global_batch_size": pp,
                "steps": 1,
                "precision": origin.precision,
            },
            "data": {"train": "unused"},
        }
    )
    return check_recipe(LoadedRecipe(recipe, origin.checkpoint, {}), gpus=count_gpus() or None, need_data=False)


def generation_topology(model: Model, tp: int, pp: int) -> dict[str, int]:
    """The section `topology`: tp ranks share the experts of a layer, too, and where there are fewer, each expert."""
    ep = 1 if model.moe is None else gcd(tp, model.moe.experts)
    return {"tp": tp, "pp": pp, "dp": 1, "ep": ep, "expert_tp": 1 if model.moe is None else tp // ep}


def run_generate(checked: Checked, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Generate; the text is printed as it comes.

    Args:
        request: the fields of `tplaunch.generate.worker.Request`.

    Returns:
        Of each prompt {"tokens", "text", "seconds"}.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    found: list[dict[str, Any]] = run_module("tplaunch.generate.worker", checked, request, task="the generation")
    return found
