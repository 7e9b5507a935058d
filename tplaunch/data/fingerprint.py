"""What the samples of a run are made of, as facts that a checkpoint keeps: a run that goes on must read the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tplaunch.data.cache import default_cache
from tplaunch.data.indexed import IndexedTokens, bin_path, idx_path, loss_path
from tplaunch.data.mixture import ORDER
from tplaunch.data.remembered import Remembered, remembered
from tplaunch.files import sha256_file
from tplaunch.recipe.schema import Recipe

WHOLE_BYTES = 64 * 2**20  # a file up to this size is hashed whole
_BLOCKS, _BLOCK_BYTES = 512, 64 * 2**10  # of a larger one, so many blocks, spread evenly


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file's size and content; of a large file's size and blocks spread over it, in hex.

    A corpus of terabytes is told from another one within a second. A change of a few bytes in the midst of a large
    file can go unseen: that is damage, which checksums of whole files are for, not another corpus.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def text_sha256(path: Path) -> str:
    """SHA-256 that tells one raw text from another; it is not read whole for that alone where it is large.

    Raw text is edited in place, as token files are not: of a large one the time of its last change counts as well.
    """
    status = path.stat()
    if status.st_size <= WHOLE_BYTES:
        return sha256_file(path)
    return hashlib.sha256(f"{sampled_sha256(path)} {status.st_mtime_ns}".encode()).hexdigest()


def tokenizer_sha256(path: Path) -> str:
    """SHA-256 of a tokenizer.json's meaning: key order and spaces aside, as in `Tokenizer.fingerprint`."""
    return hashlib.sha256(json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()).hexdigest()


def corpus_facts(prefix: Path, sums: Remembered) -> dict[str, Any]:
    """The facts of one prepared corpus: its counts, and a fingerprint of its files."""
    corpus = IndexedTokens.open(prefix)
    files = [idx_path(prefix), bin_path(prefix), *([loss_path(prefix)] if loss_path(prefix).exists() else [])]
    both = "".join(sums.sum_of(path, sampled_sha256) for path in files)
    return {
        "documents": len(corpus),
        "tokens": len(corpus.tokens),
        "sha256": hashlib.sha256(both.encode()).hexdigest(),
    }


def data_facts(recipe: Recipe, cache: Path | None = None) -> dict[str, Any]:
    """The facts of a recipe's data, as JSON values.

    Args:
        recipe: with prepared data (`prepare_recipe_data`).
        cache: as there.

    Returns:
        {"train": [corpus facts], "validation": [corpus facts], "tokenizer": SHA-256 or None,
        "order": number of the order that mixtures are read in (`mixture.ORDER`), "paths": of the training data,
        "packs": whether rows are filled with whole documents,
        "corpora": SHA-256 of every corpus of every stage, by path}.

    Raises:
        TplaunchError, OSError: a file is missing or no corpus.
    """
    data = recipe.data
    with remembered(cache or default_cache()) as sums:
        every = {source.path for source in [*recipe.corpora, *data.sources("train"), *data.sources("validation")]}
        of_each = {path: corpus_facts(Path(path), sums) for path in sorted(every)}
    facts: dict[str, Any] = {
        split: [{"weight": source.weight, **of_each[source.path]} for source in data.sources(split)]
        for split in ("train", "validation")
    }
    tokenizer = data.tokenizer
    sha256 = tokenizer_sha256(Path(tokenizer)) if isinstance(tokenizer, str) else None
    return {
        **facts,
        "tokenizer": sha256,
        "order": ORDER,
        "paths": [source.path for source in data.sources("train")],
        "packs": data.packs,
        "corpora": {source.path: of_each[source.path]["sha256"] for source in recipe.corpora},
    }
