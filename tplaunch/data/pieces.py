"""The pieces of a corpus that rows are filled with, chunk after chunk, in memory that does not grow with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.indexed import HEADER, IndexedTokens, bin_path, idx_path, loss_path
from tplaunch.data.mixture import Ints
from tplaunch.data.row_header import Kind
from tplaunch.errors import Problem, TplaunchError

CHUNK = 1 << 21  # pieces, and documents, looked at in one go


class Pieces(NamedTuple):
    """Some pieces, in the order of the corpus.

    Args:
        starts: in the corpus's tokens, int64 [n].
        lengths: in tokens, 1 to `seq_len`, int64 [n].
        truncated: documents that lost their end.
        dropped: documents that are in no row.
    """

    starts: Ints
    lengths: Ints
    truncated: int = 0
    dropped: int = 0


def pieces_of(corpus: IndexedTokens, kind: Kind, seq_len: int) -> Iterator[Pieces]:
    """The pieces of a corpus, as `fitted` counts them.

    Raises:
        TplaunchError: the index of the corpus is damaged.
    """
    return _conversations(corpus, seq_len) if kind == "chat" else _documents(corpus, seq_len)


def _conversations(corpus: IndexedTokens, seq_len: int) -> Iterator[Pieces]:
    """The beginning of each conversation, as much as fits a row, where something of it is learned."""
    idx, count, width, size = _about(corpus)
    for first in range(0, count, CHUNK):
        some = min(CHUNK, count - first)
        lengths = _read(idx, "<i4", HEADER.size + 4 * first, some).astype(np.int64)
        starts = _read(idx, "<i8", HEADER.size + 4 * count + 8 * first, some).astype(np.int64) // width
        if lengths.min() < 0 or starts.min() < 0 or (starts > size - lengths).any():
            _refuse(corpus)
        long = np.flatnonzero(lengths > seq_len)
        learned = np.zeros(len(long), np.bool_)
        if len(long):
            loss = np.memmap(loss_path(corpus.prefix), np.uint8, "r")  # anew: pages that were looked at are let go
            learned[:] = [loss[start : start + seq_len].any() for start in starts[long].tolist()]
        lengths[long] = seq_len * learned
        kept = lengths > 0
        truncated = int(learned.sum())
        yield Pieces(starts[kept], lengths[kept], truncated, len(long) - truncated)


def _documents(corpus: IndexedTokens, seq_len: int) -> Iterator[Pieces]:
    """Each document whole; of one that is longer than a row, as many rows as it fills, and what is left."""
    idx, count, width, size = _about(corpus)
    before = 0
    for first in range(0, len(corpus), CHUNK):
        some = min(CHUNK, len(corpus) - first)
        sequences = _read(idx, "<i8", HEADER.size + 12 * count + 8 * (first + 1), some)
        if sequences.min() < 0 or sequences.max() > count:
            _refuse(corpus)
        ends = np.full(some, size, np.int64)
        inside = sequences < count
        if inside.any():
            pointers = np.memmap(idx, "<i8", "r", HEADER.size + 4 * count, (count,))  # anew, as above
            ends[inside] = pointers[sequences[inside]] // width
        begins = np.concatenate([[before], ends[:-1]])
        if (begins > ends).any() or ends[-1] > size:
            _refuse(corpus)
        before = int(ends[-1])
        yield from _cut(begins, ends - begins, seq_len)


def _cut(begins: Ints, sizes: Ints, seq_len: int) -> Iterator[Pieces]:
    """The pieces of documents: of long ones there are many."""
    counts = -(-sizes // seq_len)
    after = np.cumsum(counts)
    for first in range(0, int(after[-1]), CHUNK):
        stop = min(first + CHUNK, int(after[-1]))
        some = slice(np.searchsorted(after, first, "right"), np.searchsorted(after, stop - 1, "right") + 1)
        here = np.minimum(after[some], stop) - np.maximum(after[some] - counts[some], first)
        document = np.repeat(np.arange(some.start, some.stop), here)
        skipped = (np.arange(first, stop) - (after - counts)[document]) * seq_len
        yield Pieces(begins[document] + skipped, np.minimum(sizes[document] - skipped, seq_len))


def _about(corpus: IndexedTokens) -> tuple[Path, int, int, int]:
    """The file of the index, its sequences, bytes of a token, and tokens."""
    width = corpus.tokens.itemsize
    return idx_path(corpus.prefix), len(corpus.lengths), width, os.path.getsize(bin_path(corpus.prefix)) // width


def _read(path: Path, dtype: str, at: int, count: int) -> NDArray:
    """Numbers of a file, held and not mapped."""
    found = np.fromfile(path, dtype, count, offset=at)
    if len(found) < count:
        raise TplaunchError(Problem(f"{path} is shorter than it was", fix="copy the file again"))
    return found


def _refuse(corpus: IndexedTokens) -> NoReturn:
    corpus.verify()
    raise TplaunchError(Problem(f"{idx_path(corpus.prefix)} is damaged", fix="copy the file again"))
