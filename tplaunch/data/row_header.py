"""Where the index of packed rows lies in the cache, and how its file begins: no numpy, for `plan`.

The file `rows/KEY.rows`, little-endian (`row_index` writes and reads it):

    HEADER.size bytes   `Header`
    i64[rows + 1]       of row r, its pieces are those from bounds[r] to bounds[r + 1]
    i64[pieces]         where each begins in the tokens of the corpus, row after row
    i32[pieces]         tokens of each
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from tplaunch.data.packing import VERSION
from tplaunch.files import open_regular

Kind = Literal["text", "chat"]
HEADER = struct.Struct("<8sQ32s5q")
MAGIC = b"TPLROWS\0"
_FORMAT = 1  # of the file


class Header(NamedTuple):
    """How an index begins.

    Args:
        magic: `MAGIC`.
        format: of the file.
        key: what the index was made of, and how.
        rows, pieces: counts.
        documents: of the corpus.
        truncated: conversations that lost their end.
        dropped: conversations that are in no row.
    """

    magic: bytes
    format: int
    key: bytes
    rows: int
    pieces: int
    documents: int
    truncated: int
    dropped: int

    @classmethod
    def of(cls, key: bytes, *counts: int) -> Header:
        return cls(MAGIC, _FORMAT, key, *counts)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER.size + 8 * (self.rows + 1) + 12 * self.pieces


def rows_key(prefix: str, kind: Kind, seq_len: int, sum_of: Callable[[Path], str | None]) -> bytes | None:
    """SHA-256 of all that the rows of a corpus follow from; None where a sum is not known.

    Args:
        prefix: of the corpus.
        kind: of the corpus.
        seq_len: tokens of a row.
        sum_of: fingerprint of a file (`fingerprint.sampled_sha256`).

    Raises:
        OSError: a file is missing.
    """
    files = [f"{prefix}.idx", *([f"{prefix}.loss"] if kind == "chat" else [])]
    sums = [sum_of(Path(file)) for file in files]
    if None in sums:
        return None
    made_of = [_FORMAT, VERSION, kind, seq_len, *sums, os.path.getsize(f"{prefix}.bin")]
    return hashlib.sha256(json.dumps(made_of).encode()).digest()


def rows_path(cache: Path, key: bytes) -> Path:
    """The index with that key."""
    return cache / "rows" / f"{key.hex()[:32]}.rows"


def read_header(path: Path, key: bytes) -> Header | None:
    """The header of an index; None where it is missing, damaged, of another size, or of something else."""
    try:
        with open_regular(path) as file:
            found = Header(*HEADER.unpack(file.read(HEADER.size)))
            size = os.fstat(file.fileno()).st_size
    except (OSError, struct.error):
        return None
    counts = found[3:]
    fits = found[:3] == (MAGIC, _FORMAT, key) and min(counts) >= 0 and found.size == size
    return found if fits else None
