"""What a model is given, and where it stops: the same in `tplaunch generate` and in a run's samples. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.settings import Settings


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, as transformers makes them; one that would be empty begins a document."""
    return [tokenizer.encode_prompt(prompt) or [tokenizer.eod] for prompt in prompts]


def ends_of(tokenizer: Tokenizer, settings: Settings) -> tuple[int, ...]:
    """Tokens after which there are no more."""
    return settings.ends or (tokenizer.eod,)
