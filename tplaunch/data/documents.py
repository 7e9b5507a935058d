"""How long the documents of the training data are, from a sample of the index files alone: no numpy, for `plan`."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap

from tplaunch.data.fitted import HEADER, TOKEN_BYTES
from tplaunch.data.made import prefixes
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.attention import length_of_equal_work

_NUMBER = struct.Struct("<q")
_LOOKED_AT = 4096  # documents of a corpus, evenly spread


def document_lengths(prefix: str) -> list[int]:
    """Tokens of documents of a .bin/.idx pair, of many a sample; none where there is no pair that can be read."""
    try:
        with open(f"{prefix}.idx", "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as index:
            return list(_lengths(index, os.path.getsize(f"{prefix}.bin")))
    except (OSError, struct.error, ValueError, KeyError):
        return []


def _lengths(index: mmap, size: int) -> Iterator[int]:
    magic, _, code, sequences, entries = HEADER.unpack_from(index)
    if not magic.startswith(b"MMIDIDX"):
        return
    offsets, bounds = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences

    def number(place: int) -> int:
        return int(_NUMBER.unpack_from(index, place)[0])

    def begin(document: int) -> int:
        """The byte of .bin at which a document begins."""
        sequence = number(bounds + 8 * document)
        return number(offsets + 8 * sequence) if sequence < sequences else size

    documents = entries - 1
    for one in range(0, documents, max(1, documents // _LOOKED_AT)):
        if length := (begin(one + 1) - begin(one)) // TOKEN_BYTES[code]:
            yield length


def with_document_length(recipe: Recipe) -> Recipe:
    """The recipe with `data.document_length` as in its prepared data, where there are any and documents are kept apart:
    the length that all documents would have, if they took the same attention."""
    data = recipe.data
    if not recipe.training.document_mask:
        return recipe
    weights, found = [], []  # a weight: how often each document counts, by what is read of its corpus
    for source, prefix in zip(recipe.corpora, prefixes(recipe), strict=True):
        if prefix and (lengths := document_lengths(prefix)):
            weights.append(source.weight / sum(lengths))
            found.append(lengths)
    if not found:
        return recipe
    documents = ((length, weight) for weight, some in zip(weights, found, strict=True) for length in some)
    length = round(length_of_equal_work(recipe.training.seq_len, documents))
    return recipe.model_copy(update={"data": data.model_copy(update={"document_length": max(1, length)})})
