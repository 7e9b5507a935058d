"""Starts a generation on this machine. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.checkpoint.origin import Origin
from tplaunch.data.chat import read_template, render
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError
from tplaunch.generate.memory import most_pages, page_bytes
from tplaunch.generate.prompts import Asked, ends_of, prompt_ids, texts_of
from tplaunch.generate.settings import Settings, read_settings
from tplaunch.launch.helper import run_module
from tplaunch.machine import count_gpus
from tplaunch.recipe.load import LoadedRecipe
from tplaunch.recipe.schema import Model, Recipe
from tplaunch.spec.pages import PAGE
from tplaunch.units import format_bytes


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


def encode(origin: Origin, asked: Sequence[Asked], max_tokens: int, *, chat: bool = False) -> Prompts:
    """Prompts as token ids.

    Args:
        chat: they are rendered by the chat template; a text is what the user says.

    Raises:
        TplaunchError: there is no tokenizer, it has more tokens than the model, a prompt leaves the model no room, or
            has messages that no template renders.
    """
    if origin.tokenizer is None:
        fix = "put its tokenizer.json beside the checkpoint directory"
        raise TplaunchError(Problem(f"no tokenizer is known of {origin.checkpoint}", fix=fix))
    tokenizer = Tokenizer(origin.tokenizer)
    if tokenizer.vocab_size > origin.model.vocab_size:
        what = f"{origin.tokenizer} has {tokenizer.vocab_size} tokens, the model {origin.model.vocab_size}"
        raise TplaunchError(Problem(what, fix="give the tokenizer that it was trained with"))
    if chat:
        template = read_template(origin.tokenizer)
        chats = [one.messages or [{"role": "user", "content": one.text}] for one in asked]
        texts = render(template, origin.tokenizer, chats)
        found = [tokenizer.encode_prompt(text, whole=True) or [tokenizer.eod] for text in texts]
    else:
        found = prompt_ids(tokenizer, list(texts_of(asked)))
    limit, longest = origin.model.max_position, max(map(len, found)) + max_tokens
    if limit is not None and longest > limit:
        where = next(one.where for one, ids in zip(asked, found, strict=True) if len(ids) + max_tokens == longest)
        what = f"{where}: {longest} tokens, prompt and all, are more than the {limit} positions of the model"
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


def say_memory(recipe: Recipe, prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int) -> str:
    """What keys and values take at most, on the rank that has most of them."""
    page, together = page_bytes(recipe), min(batch_size, len(prompts))
    lengths = [len(prompt) for prompt in prompts]
    most = most_pages(lengths, max_tokens, together) * page
    return (
        f"key/value cache: pages of {PAGE} tokens, {format_bytes(page)} each, taken as texts grow; at most "
        f"{format_bytes(most)} a rank, for {together} of {max(lengths) + max_tokens:,} tokens together"
    )


def run_generate(checked: Checked, request: dict[str, Any]) -> dict[str, Any]:
    """Generate; what follows the prompts is printed, or written, as it comes.

    Args:
        request: the fields of `tplaunch.generate.worker.Request`.

    Returns:
        The fields of `tplaunch.generate.decode.Speed`.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    found: dict[str, Any] = run_module("tplaunch.generate.worker", checked, request, task="the generation")
    return found
