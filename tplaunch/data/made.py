"""What the cache holds of raw text, and under which names: found by remembered checksums alone, without numpy, for
`plan`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tplaunch.data.beside import GENERATION, SPECIAL, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from tplaunch.data.cache import default_cache
from tplaunch.data.endings import files_of, is_raw
from tplaunch.data.remembered import Remembered
from tplaunch.files import sha256_file
from tplaunch.recipe.schema import Data, Recipe, TrainTokenizer

FORMAT = 1  # raise it when the same text would give other files
TEXT_SUM = "text_sha256"  # the function of `fingerprint` by which raw text is remembered
TOKENS_SUM = "sampled_sha256"  # and the one for token files


def digest(parts: list[Any]) -> str:
    """A short name of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def corpora(cache: Path) -> Path:
    """The folder of the prepared corpora."""
    return cache / "corpora"


def trained_tokenizer(cache: Path, vocab_size: int, text_key: str, texts: Sequence[str]) -> Path:
    """The tokenizer that is trained on texts, given by their sums."""
    return cache / "tokenizers" / f"{digest([FORMAT, vocab_size, text_key, texts])}.json"


def recipe_name(texts: Sequence[str], tokenizer: Path, recipe: Recipe, sums: Remembered) -> str:
    """What a recipe asks for in one name: texts, given by their sums, by a tokenizer's file and what lies beside it.

    The name of the corpus itself follows from the tokenizer's meaning, which takes its library to know.
    """
    data, finetune, chat = recipe.data, recipe.finetune, recipe.data.kind == "chat"
    names = [TOKENIZER_CONFIG, GENERATION] if tokenizer.name == TOKENIZER else []
    if chat:
        names += [TEMPLATE, SPECIAL]
    files = [tokenizer, *(path for name in names if (path := tokenizer.with_name(name)).is_file())]
    if chat and finetune.chat_template is not None:
        files.append(Path(finetune.chat_template))
    how = [data.kind, finetune.chat_template is None, finetune.loss_on] if chat else [data.text_key]
    return digest([FORMAT, texts, [sums.sum_of(path, sha256_file) for path in files], data.eod, *how])


def prefixes(recipe: Recipe, cache: Path | None = None) -> Iterator[str | None]:
    """Where each corpus of the training data lies in token files; None: raw text that is not known to be prepared."""
    data, cache = recipe.data, (cache or default_cache()).absolute()
    paths = [Path(source.path) for source in recipe.corpora]
    raw = [is_raw(path) for path in paths]
    if not any(raw):
        yield from map(str, paths)
        return
    sums = Remembered(cache / "sums.json")
    texts = [_known(path, sums) if one else None for path, one in zip(paths, raw, strict=True)]
    tokenizer = _tokenizer(data, cache, [known for known, one in zip(texts, raw, strict=True) if one])
    for path, one, known in zip(paths, raw, texts, strict=True):
        name = None
        if known and tokenizer and tokenizer.is_file():
            name = sums.made(recipe_name(known, tokenizer, recipe, sums))
        yield (str(corpora(cache) / name) if name else None) if one else str(path)


def _known(path: Path, sums: Remembered) -> list[str] | None:
    """The sums of the files of a raw source, where all are remembered."""
    found = [sums.known(file, TEXT_SUM) for file in files_of(path.absolute())]
    return [one for one in found if one is not None] if found and None not in found else None


def _tokenizer(data: Data, cache: Path, raw: list[list[str] | None]) -> Path | None:
    """The tokenizer of raw text: a file, or the one that was trained on all of it."""
    if isinstance(data.tokenizer, str):
        return Path(data.tokenizer).absolute()
    if not isinstance(data.tokenizer, TrainTokenizer) or None in raw:
        return None
    texts = [one for known in raw if known for one in known]
    return trained_tokenizer(cache, data.tokenizer.vocab_size, data.text_key, texts)
