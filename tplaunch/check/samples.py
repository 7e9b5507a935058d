"""What is wrong with `logging.samples`: prompts that are not there, are empty, or leave the model no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tplaunch.data.endings import is_raw
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.recipe.schema import Recipe

_KEY = "logging.samples"


def sample_problems(recipe: Recipe) -> Iterator[Problem]:
    """What the recipe alone tells."""
    asked, seq_len = recipe.logging.samples, recipe.training.seq_len
    if asked.every and not asked.prompts:
        yield Problem("there is no prompt to continue", fix='prompts: ["Once upon a time"], or every: 0', key=_KEY)
    for number, prompt in enumerate(asked.prompts):
        if not prompt:
            yield Problem("is empty", fix="write how a text begins, or leave it out", key=f"{_KEY}.prompts[{number}]")
    if asked.every and asked.max_tokens >= seq_len:
        yield Problem(
            f"{asked.max_tokens} leaves no room for a prompt in training.seq_len {seq_len}",
            fix=f"max_tokens: at most {seq_len - 1}",
            key=f"{_KEY}.max_tokens",
        )


def sample_warnings(recipe: Recipe) -> Iterator[Problem]:
    """Prompts that are never continued."""
    if recipe.logging.samples.prompts and not recipe.logging.samples.every:
        yield Problem("are never continued: every is 0", fix="set logging.samples.every", key=f"{_KEY}.prompts")


def prompt_problems(recipe: Recipe) -> Iterator[Problem]:
    """What the tokenizer tells, where it is there already: that there is none, or that a prompt is too long."""
    data = recipe.data
    sources = [Path(source.path) for source in recipe.corpora]
    if not recipe.logging.samples.every:
        return
    if isinstance(data.tokenizer, str):
        if Path(data.tokenizer).is_file():
            yield from _too_long(recipe, Path(data.tokenizer))
    elif data.tokenizer is None and not any(is_raw(path) for path in sources):
        from tplaunch.data.corpus import tokenizer_path  # imports numpy

        beside = [path for path in map(tokenizer_path, sources) if path.is_file()]
        yield from _too_long(recipe, beside[0]) if beside else [_none()]


def check_prompts(recipe: Recipe, tokenizer: Path | None) -> None:
    """Refuse prompts that a run could not continue; its tokenizer is there now, or there is none.

    Raises:
        RecipeError: holds every problem.
    """
    if recipe.logging.samples.every:
        problems = [_none()] if tokenizer is None else [*_too_long(recipe, tokenizer)]
        if problems:
            raise RecipeError(*problems)


def _none() -> Problem:
    why = "prompts are text, and the data were tokenized elsewhere"
    return Problem("needs a tokenizer", why, "data.tokenizer: the tokenizer.json of the data, or every: 0", key=_KEY)


def _too_long(recipe: Recipe, path: Path) -> Iterator[Problem]:
    from tplaunch.data.tokenizer import Tokenizer  # imports numpy

    asked, seq_len = recipe.logging.samples, recipe.training.seq_len
    room = seq_len - asked.max_tokens
    if room < 1:
        return  # `sample_problems` says so
    with suppress(TplaunchError):  # what is wrong with the file is said where the data are prepared
        tokenizer = Tokenizer(path, recipe.data.eod)
        for number, prompt in enumerate(asked.prompts):
            count = len(tokenizer.encode_prompt(prompt))
            if count > room:
                fewer = f", or max_tokens: {seq_len - count}" if count < seq_len else ""
                yield Problem(
                    f"{count} tokens, and max_tokens {asked.max_tokens} after them, exceed training.seq_len {seq_len}",
                    fix=f"a prompt of at most {room} tokens{fewer}",
                    key=f"{_KEY}.prompts[{number}]",
                )
