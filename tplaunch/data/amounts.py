"""How much of each corpus a run will read, from the headers of its files alone (of raw text: those in the
cache): no numpy, for `plan`."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tplaunch.data.endings import files_of, is_raw
from tplaunch.data.made import prefixes
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course
from tplaunch.units import format_count

WORN_OUT = 4  # epochs of a corpus that teach about as much as new text
_BEGIN = struct.Struct("<9sQB")  # of an .idx file: magic, version, dtype code (see `indexed`)
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_SHOWN = 10


@dataclass(frozen=True)
class Amount:
    """A corpus of the training data in a run.

    Attributes:
        key: of the recipe.
        path: as the recipe has it.
        share: of the run's samples, 0 to 1.
        tokens: None where they cannot be counted: raw text that the cache does not have in tokens, or no corpus there.
        samples: of `training.seq_len` tokens, each read once an epoch.
        epochs: how often it is read by the end of the run.
    """

    key: str
    path: str
    share: float
    tokens: int | None = None
    samples: int | None = None
    epochs: float | None = None


def count_tokens(prefix: str) -> int | None:
    """Tokens of a .bin/.idx pair; None where there is none that can be read."""
    try:
        with open(f"{prefix}.idx", "rb") as file:
            magic, _, code = _BEGIN.unpack(file.read(_BEGIN.size))
        size = os.path.getsize(f"{prefix}.bin")
    except (OSError, struct.error):
        return None
    return size // TOKEN_BYTES[code] if magic.startswith(b"MMIDIDX") and code in TOKEN_BYTES else None


def amounts(recipe: Recipe) -> list[Amount]:
    """Each corpus of the training data, over the whole run."""
    training, sources = recipe.training, recipe.data.sources("train")
    total = Course(recipe).first_sample(training.steps + 1)
    largest = max(source.weight for source in sources)
    weights = sum(source.weight / largest for source in sources)
    found = []
    for number, (source, prefix) in enumerate(zip(sources, prefixes(recipe), strict=True)):
        key = "data.train" if isinstance(recipe.data.train, str) else f"data.train[{number}]"
        share = source.weight / largest / weights
        tokens = count_tokens(prefix) if prefix else None
        samples = None if tokens is None else (tokens - 1) // training.seq_len
        epochs = total * share / samples if samples and samples > 0 else None
        found.append(Amount(key, source.path, share, tokens, samples, epochs))
    return found


def in_words(found: Sequence[Amount]) -> Iterator[str]:
    """A line for each corpus, those that are read most often first; of many, the first ones."""
    for amount in sorted(found, key=lambda amount: -(amount.epochs or 0.0))[:_SHOWN]:
        share = f", share {100 * amount.share:.4g} %" if len(found) > 1 else ""
        if amount.tokens is None:
            raw = is_raw(Path(amount.path)) and any(map(os.path.isfile, files_of(Path(amount.path))))
            yield f"{amount.path}{share}: " + ("text, counted once it is tokenized" if raw else "not at hand")
        else:
            often = "" if amount.epochs is None else f", {format_epochs(amount.epochs)} by the end of the run"
            yield f"{amount.path}{share}: {format_count(amount.tokens)} tokens{often}"
    if len(found) > _SHOWN:
        yield f"and {len(found) - _SHOWN:,} corpora more"


def worn_out(found: Sequence[Amount]) -> Iterator[Problem]:
    """A warning for each corpus that is read too often, the worst first; of many, the first ones."""
    often = [amount for amount in found if amount.epochs is not None and amount.epochs > WORN_OUT]
    for amount in sorted(often, key=lambda amount: -(amount.epochs or 0.0))[:_SHOWN]:
        yield Problem(
            f"{amount.path} is read {format_epochs(amount.epochs or 0.0)} by the end of the run",
            why=f"past {WORN_OUT}, repeated text teaches less and less (Muennighoff et al. 2023, arXiv 2305.16264)",
            fix="use more text, fewer training.steps" + (", or a smaller weight" if len(found) > 1 else ""),
            key=amount.key,
        )


def format_epochs(epochs: float) -> str:
    return f"{epochs:.2f} epochs" if epochs < 10 else f"{epochs:,.1f} epochs"
