"""How much of each corpus a run will read, from the headers of its files alone (of raw text: those in the
cache): no numpy, for `plan`."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tplaunch.data.cache import default_cache
from tplaunch.data.endings import files_of, is_raw
from tplaunch.data.fitted import TOKEN_BYTES, fit, fit_text
from tplaunch.data.made import TOKENS_SUM, prefixes
from tplaunch.data.packing import count_rows
from tplaunch.data.remembered import Remembered
from tplaunch.data.row_header import Header, Kind, read_header, rows_key, rows_path
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe, occurrences
from tplaunch.spec.course import Course
from tplaunch.spec.run_stages import longest_samples, shares
from tplaunch.units import format_count

WORN_OUT = 4  # epochs of a corpus that teach about as much as new text
_BEGIN = struct.Struct("<9sQB")  # of an .idx file: magic, version, dtype code (see `indexed`)
_SHOWN = 10


@dataclass(frozen=True)
class Amount:
    """A corpus of the training data in a run.

    Attributes:
        key: of the recipe.
        path: as the recipe has it.
        share: of what the run reads, 0 to 1.
        tokens: None where they cannot be counted: raw text that the cache does not have in tokens, or no corpus there.
        samples: of `seq_len` tokens, each read once an epoch.
        epochs: how often it is read by the end of the run.
        conversations: how they fit into samples, where it has any.
        by_stage: `epochs` of each stage; () where they are not known.
    """

    key: str
    path: str
    share: float
    tokens: int | None = None
    samples: int | None = None
    epochs: float | None = None
    conversations: Conversations | None = None
    by_stage: tuple[float, ...] = ()


@dataclass(frozen=True)
class Conversations:
    """How the conversations of a corpus fit into rows of `training.seq_len` tokens (`fitted.Fitted`).

    Attributes:
        count: in rows.
        truncated: that lost their end.
        dropped: that are in no row.
        unanswered: that were left out before, as nothing in them is learned.
        answers, unended, merged: as `corpus.ChatMeta` has them.
    """

    count: int
    truncated: int
    dropped: int
    unanswered: int
    answers: int
    unended: int
    merged: int


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
    course, lengths = Course(recipe), longest_samples(recipe)
    read = [_tokens_of(recipe, course, number) for number in range(len(course.stages))]
    cache = default_cache()
    sums = Remembered(cache / "sums.json") if recipe.data.packs else None
    found = []
    for (key, source), name, prefix in zip(
        recipe.keyed_corpora(), occurrences(recipe.corpora), prefixes(recipe), strict=True
    ):
        seq_len, taken = lengths[source.path], [stage.get(name, 0.0) for stage in read]
        tokens = count_tokens(prefix) if prefix else None
        samples = None if tokens is None else (tokens - 1) // seq_len
        conversations = None
        if tokens is not None and sums:
            header = _packed_before(str(prefix), recipe.data.kind, seq_len, cache, sums)
            if recipe.data.kind == "chat":
                samples, conversations = _conversations(str(prefix), seq_len, header)
            else:
                samples = header.rows if header else _rows(str(prefix), seq_len)
        each = tuple(one / (samples * seq_len) for one in taken) if samples and samples > 0 else ()
        share, epochs = sum(taken) / course.tokens, sum(each) or None
        key = key.removesuffix(".path")
        found.append(Amount(key, source.path, share, tokens, samples, epochs, conversations, each))
    return found


def _tokens_of(recipe: Recipe, course: Course, number: int) -> dict[tuple[str, int], float]:
    """Tokens that a stage reads of each of its corpora."""
    steps = course.stages[number]
    total = course.batches.tokens(steps.stop - 1) - course.batches.tokens(steps.start - 1)
    return {name: total * share for name, share in shares(recipe, number).items()}


def _rows(prefix: str, seq_len: int) -> int | None:
    """Rows of packed documents; None where a file is missing or damaged."""
    try:
        return count_rows(fit_text(prefix, seq_len), seq_len)
    except (OSError, ValueError, KeyError, IndexError, struct.error):
        return None


def _packed_before(prefix: str, kind: Kind, seq_len: int, cache: Path, sums: Remembered) -> Header | None:
    """What the index of a corpus's rows says, where a launch has built it and no file changed since."""
    try:
        key = rows_key(prefix, kind, seq_len, lambda path: sums.known(path, TOKENS_SUM))
    except OSError:
        return None
    return read_header(rows_path(cache, key), key) if key else None


def _conversations(prefix: str, seq_len: int, header: Header | None) -> tuple[int | None, Conversations | None]:
    """Rows of conversations, and how these fit into them; None where a file is missing or damaged."""
    try:
        found = header or fit(prefix, seq_len)
        rows = found.rows if isinstance(found, Header) else count_rows(found.counts, seq_len)
        about = _about(prefix)
    except (OSError, ValueError, KeyError, struct.error):
        return None, None
    kept = found.documents - found.dropped
    names = ("unanswered", "answers", "unended", "merged")
    return rows, Conversations(kept, found.truncated, found.dropped, *(int(about.get(name, 0)) for name in names))


def _about(prefix: str) -> dict[str, int]:
    """What is known of conversations from when they were prepared."""
    try:
        with open(f"{prefix}.meta.json", encoding="utf-8") as file:
            return json.load(file)["chat"] or {}
    except (FileNotFoundError, KeyError):
        return {}


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
            if amount.conversations and amount.samples:
                yield f"{amount.path}: {_in_rows(amount.conversations, amount.samples)}"
    if len(found) > _SHOWN:
        yield f"and {len(found) - _SHOWN:,} corpora more"


def _in_rows(found: Conversations, rows: int) -> str:
    """How conversations fit, in words."""
    many = f"{found.count:,} conversation{'s' * (found.count != 1)} in {rows:,} row{'s' * (rows != 1)}"
    lost = (
        (found.truncated, "cut off at the end of a row"),
        (found.dropped, "left out: nothing of the beginning that fits a row is learned"),
        (found.unanswered, "left out: nothing in them is learned"),
    )
    return "; ".join([many, *(f"{count:,} {what}" for count, what in lost if count)])


def unlearned(found: Sequence[Amount]) -> Iterator[Problem]:
    """A warning for each corpus of conversations of which a model learns something else than was meant."""
    for amount in found:
        if (told := amount.conversations) is None:
            continue
        if told.unended:
            yield Problem(
                f"{told.unended:,} of {told.answers:,} answers in {amount.path} end without a token that stops a model",
                why="it would not learn to stop there",
                fix="name the token that ends a turn as eos_token_id in generation_config.json beside the tokenizer, "
                "or write one in the chat template",
                key=amount.key,
            )
        if told.merged:
            yield Problem(
                f"{told.merged:,} prompts in {amount.path} end within a token of their completion",
                why="the model is asked by other tokens than it learns to answer",
                fix="begin the completion, not the prompt, with the space between them",
                key=amount.key,
            )


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
