"""How documents fit into rows, from their files alone: no numpy, for `plan`."""

from __future__ import annotations

import json
import os
import struct
from array import array
from dataclasses import dataclass
from itertools import accumulate
from mmap import ACCESS_READ, mmap

from tplaunch.data.packing import count_rows

TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # of a token, by the dtype code of an .idx file
HEADER = struct.Struct("<9sQBQQ")  # of an .idx file: magic, version, dtype code, sequences, documents + 1


@dataclass(frozen=True)
class Fitted:
    """Conversations in rows of so many tokens: a longer one keeps its beginning, as TRL's `keep_start` has it.

    Attributes:
        lengths: tokens that each has in its row; 0: nothing of its beginning is learned, so it is in none.
        truncated: that lost their end.
        dropped: that are in no row.
        unanswered: that were left out before, as nothing in them is learned.
        answers, unended, merged: as `corpus.ChatMeta` has them.
    """

    lengths: array[int]
    truncated: int
    dropped: int
    unanswered: int = 0
    answers: int = 0
    unended: int = 0
    merged: int = 0

    def count_rows(self, seq_len: int) -> int:
        """The rows that they are packed into."""
        return count_rows(self.lengths, seq_len)


def fit_text(prefix: str, seq_len: int) -> array[int]:
    """Tokens of the pieces of documents, in order: each document is one piece, a longer one as many of `seq_len` as it
    takes, and what is left.

    Args:
        prefix: of their .bin and .idx.

    Raises:
        OSError, ValueError, KeyError, struct.error: a file is missing, or damaged.
    """
    offsets, documents = array("q"), array("q")
    with open(f"{prefix}.idx", "rb") as file:
        _, _, code, sequences, entries = HEADER.unpack(file.read(HEADER.size))
        file.seek(4 * sequences, os.SEEK_CUR)
        offsets.frombytes(file.read(8 * sequences))
        documents.frombytes(file.read(8 * entries))
    offsets.append(os.path.getsize(f"{prefix}.bin"))
    pieces, width, end = array("i"), TOKEN_BYTES[code], 0
    for sequence in documents[1:]:
        begin, end = end, offsets[sequence] // width
        whole, rest = divmod(end - begin, seq_len)
        if whole:
            pieces.extend([seq_len] * whole)
        if rest:
            pieces.append(rest)
    return pieces


def fit(prefix: str, seq_len: int) -> Fitted:
    """Fit conversations into rows; a pure function of their files and of the rows' length.

    Args:
        prefix: of their .bin, .idx and .loss.

    Raises:
        OSError, ValueError, struct.error: a file is missing, or damaged.
    """
    lengths = array("i")
    with open(f"{prefix}.idx", "rb") as file:
        sequences = HEADER.unpack(file.read(HEADER.size))[3]
        lengths.frombytes(file.read(4 * sequences))
    long = [number for number, length in enumerate(lengths) if length > seq_len]
    dropped = 0
    if long:
        starts = list(accumulate(lengths, initial=0))
        with open(f"{prefix}.loss", "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as loss:
            for number in long:
                start = starts[number]
                learned = loss.find(b"\1", start, start + seq_len) >= 0
                lengths[number] = seq_len if learned else 0
                dropped += not learned
    try:
        with open(f"{prefix}.meta.json", encoding="utf-8") as about:
            chat = json.load(about)["chat"] or {}
    except (FileNotFoundError, KeyError):
        chat = {}
    counts = {name: int(chat.get(name, 0)) for name in ("unanswered", "answers", "unended", "merged")}
    return Fitted(lengths, len(long) - dropped, dropped, **counts)
