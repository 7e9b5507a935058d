"""What a model's `generation_config.json` says of generating: where to stop, and how tokens are chosen. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tplaunch.data.beside import GENERATION, read_beside
from tplaunch.errors import Problem, TplaunchError

# What else changes which token comes next, and its value that changes nothing.
_OTHER: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1),
    "num_beams": (None, 1),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
}
# What says how tokens are chosen where they are not simply the likeliest, and the most it can be.
_SAMPLED: tuple[tuple[str, int | None], ...] = (("temperature", None), ("top_k", None), ("top_p", 1), ("min_p", 1))


@dataclass(frozen=True)
class Settings:
    """What is said; None where nothing is.

    Args:
        ends: tokens after which there are no more.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        other: keys that change what transformers generates, and nothing here.
    """

    ends: tuple[int, ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    other: tuple[str, ...] = ()


def read_settings(tokenizer: Path) -> Settings:
    """Of the folder of a tokenizer.

    Raises:
        TplaunchError: the file cannot be read, or says something else where a number must be.
    """
    found = read_beside(tokenizer, GENERATION)
    eos = found.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(end) is int for end in ends):
        raise TplaunchError(_wrong(tokenizer, "eos_token_id", "a number, or a list of numbers"))
    chosen = {}
    samples = found.get("do_sample") is True
    for name, most in (*(_SAMPLED if samples else ()), ("repetition_penalty", None)):
        value = found.get(name)
        if value is None:
            continue
        kinds = (int,) if name == "top_k" else (int, float)
        positive = name == "repetition_penalty"  # it divides
        if type(value) not in kinds or not 0 <= value <= (most or value) or (positive and value == 0):
            begins = "above 0" if positive else "from 0"
            raise TplaunchError(_wrong(tokenizer, name, f"a number {begins}" + (f" to {most}" if most else "")))
        chosen[name] = value
    other = tuple(name for name, values in _OTHER.items() if found.get(name) not in values)
    return Settings(ends=tuple(ends) or None, other=other, **chosen)


def _wrong(tokenizer: Path, name: str, kind: str) -> Problem:
    return Problem(f"{tokenizer.with_name(GENERATION)}: {name} must be {kind}", fix="mend it, or remove it")
