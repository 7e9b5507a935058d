"""How documents fit into rows, from their files alone: no numpy, for `plan`."""

from __future__ import annotations

import os
import struct
from array import array
from collections import Counter
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from operator import sub

TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # of a token, by the dtype code of an .idx file
HEADER = struct.Struct("<9sQBQQ")  # of an .idx file: magic, version, dtype code, sequences, documents + 1


_CHUNK = 1 << 16  # documents looked at in one go


@dataclass(frozen=True)
class Fitted:
    """Conversations in rows of so many tokens: a longer one keeps its beginning, as TRL's `keep_start` has it.

    Attributes:
        counts: conversations by the tokens that each has in its row.
        documents: conversations of the corpus.
        truncated: that lost their end.
        dropped: that are in no row, as nothing of their beginning is learned.
    """

    counts: Counter[int]
    documents: int
    truncated: int
    dropped: int


def fit_text(prefix: str, seq_len: int) -> Counter[int]:
    """Count the pieces of documents by their tokens: each document is one piece, a longer one as many of `seq_len` as
    it takes, and what is left.

    Args:
        prefix: of their .bin and .idx.

    Raises:
        OSError, ValueError, KeyError, IndexError, struct.error: a file is missing, or damaged.
    """
    sizes = Counter[int]()
    with open(f"{prefix}.idx", "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as index:
        _, _, code, sequences, entries = HEADER.unpack_from(index)
        end = os.path.getsize(f"{prefix}.bin")
        before, at = 0, HEADER.size + 4 * sequences
        with memoryview(index) as content, content[at : at + 8 * sequences] as section, section.cast("q") as offsets:
            for first in range(1, entries, _CHUNK):
                documents = _numbers(index, "q", at + 8 * (sequences + first), min(_CHUNK, entries - first))
                ends = [offsets[one] if one < sequences else end for one in documents]
                sizes.update(map(sub, ends, [before, *ends]))
                before = ends[-1]
    counts, width = Counter[int](), TOKEN_BYTES[code]
    for size, many in sizes.items():
        if size < 0:
            raise ValueError("documents do not follow one another")
        whole, rest = divmod(size // width, seq_len)
        counts[seq_len] += many * whole
        counts[rest] += many
    del counts[0]
    return +counts


def fit(prefix: str, seq_len: int) -> Fitted:
    """Fit conversations into rows; a pure function of their files and of the rows' length.

    Args:
        prefix: of their .bin, .idx and .loss.

    Raises:
        OSError, ValueError, KeyError, struct.error: a file is missing, or damaged.
    """
    counts, truncated, dropped = Counter[int](), 0, 0
    with open(f"{prefix}.idx", "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as index:
        _, _, code, count, _ = HEADER.unpack_from(index)
        for first in range(0, count, _CHUNK):
            some = min(_CHUNK, count - first)
            lengths = _numbers(index, "i", HEADER.size + 4 * first, some)
            counts.update(lengths)
            long = [number for number, length in enumerate(lengths) if length > seq_len]
            if long:
                starts = _numbers(index, "q", HEADER.size + 4 * count + 8 * first, some)
                with open(f"{prefix}.loss", "rb") as learned, mmap(learned.fileno(), 0, access=ACCESS_READ) as loss:
                    for number in long:
                        start = starts[number] // TOKEN_BYTES[code]
                        kept = loss.find(b"\1", start, start + seq_len) >= 0
                        truncated, dropped = truncated + kept, dropped + (not kept)
    for length in [length for length in counts if length > seq_len]:
        del counts[length]
    counts[seq_len] += truncated
    del counts[0]
    return Fitted(+counts, count, truncated, dropped)


def _numbers(index: mmap, code: str, at: int, count: int) -> array[int]:
    found = array(code)
    found.frombytes(index[at : at + count * found.itemsize])
    return found
