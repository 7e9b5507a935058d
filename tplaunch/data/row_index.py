"""The index of packed rows: built once, in memory that does not grow with the corpus, and mapped by every rank."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tplaunch.data.cache import owned, subdirectory
from tplaunch.data.fingerprint import sampled_sha256
from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.mixture import Ints
from tplaunch.data.packing import Layout
from tplaunch.data.pieces import CHUNK, pieces_of
from tplaunch.data.progress import Progress
from tplaunch.data.remembered import Remembered
from tplaunch.data.row_header import HEADER, Header, Kind, read_header, rows_key, rows_path
from tplaunch.errors import Problem, TplaunchError

_SILENT = Progress(False)


class RowIndex:
    """Which pieces of a corpus fill each row, in a mapped file of which nothing is believed.

    Args:
        path: of the index.
        header: of it.
        tokens: of the corpus.
        seq_len: of a row.
    """

    def __init__(self, path: Path, header: Header, tokens: int, seq_len: int) -> None:
        self.path, self.header, self._tokens, self._seq_len = path, header, tokens, seq_len
        content = np.memmap(path, np.uint8, "r", shape=(header.size,))
        bounds_end = HEADER.size + 8 * (header.rows + 1)
        starts_end = bounds_end + 8 * header.pieces
        self._bounds = content[HEADER.size : bounds_end].view("<i8")
        self._starts, self._lengths = content[bounds_end:starts_end].view("<i8"), content[starts_end:].view("<i4")

    def __len__(self) -> int:
        """Number of rows."""
        return self.header.rows

    def __getitem__(self, row: int) -> list[tuple[int, int]]:
        """First token in the corpus, and tokens, of each piece of a row, in their order.

        Raises:
            TplaunchError: these are no pieces of this corpus that fit a row.
        """
        first, stop = self._bounds[row : row + 2].tolist()
        if 0 <= first < stop <= min(first + self._seq_len, self.header.pieces):
            starts, lengths = self._starts[first:stop].tolist(), self._lengths[first:stop].tolist()
            found = [*zip(starts, lengths, strict=True)]
            inside = all(start >= 0 < length and start + length <= self._tokens for start, length in found)
            if inside and sum(lengths) <= self._seq_len:
                return found
        raise TplaunchError(
            Problem(f"{self.path}: row {row:,} is damaged", fix="remove the file: the next start makes it again")
        )


def key_of(prefix: Path, kind: Kind, seq_len: int, sums: Remembered) -> bytes:
    """The key of the index of a corpus's rows, by fingerprints of its files that are remembered, or taken now."""
    key = rows_key(str(prefix), kind, seq_len, lambda path: sums.sum_of(path, sampled_sha256))
    assert key is not None, "every sum is taken"
    return key


def ready_rows(
    corpus: IndexedTokens, kind: Kind, seq_len: int, cache: Path, key: bytes, show: Progress = _SILENT
) -> RowIndex:
    """Open an index; build it first where it is missing or damaged, by one process of several at one time.

    Args:
        key: of the index (`key_of`).

    Raises:
        TplaunchError: there is no row, the corpus is damaged, or the index cannot be written.
    """
    path = rows_path(cache, key)
    header = read_header(path, key)
    if header is None:
        subdirectory(cache, path.parent.name)
        with owned(path, show):
            header = read_header(path, key) or _build(corpus, kind, seq_len, key, path, show)
    if not header.rows:
        what = f"{corpus.prefix}: nothing is learned in the first {seq_len:,} tokens of any conversation"
        fix = "raise training.seq_len"
        if kind == "text":
            what, fix = f"{corpus.prefix} has no tokens", "use more text"
        raise TplaunchError(Problem(what, fix=fix))
    return RowIndex(path, header, len(corpus.tokens), seq_len)


def _build(corpus: IndexedTokens, kind: Kind, seq_len: int, key: bytes, path: Path, show: Progress) -> Header:
    """Write an index, whole or not at all, in three passes: count lengths, sort by length, go through the rows."""
    counts = np.zeros(seq_len + 1, np.int64)
    documents = len(corpus.lengths if kind == "chat" else corpus)
    truncated = dropped = 0
    with show.task(f"filling rows with {corpus.prefix.name}", 3 * len(corpus.tokens)) as advance:
        for some in pieces_of(corpus, kind, seq_len):
            counts += np.bincount(some.lengths, minlength=seq_len + 1)
            truncated, dropped = truncated + some.truncated, dropped + some.dropped
            advance(int(some.lengths.sum()))
        layout = Layout({int(length): int(counts[length]) for length in np.flatnonzero(counts)}, seq_len)
        header = Header.of(key, layout.rows, int(counts.sum()), documents, truncated, dropped)
        # The name is this host's own: where locks do not reach other hosts, two may write.
        temporary = path.with_name(f"{path.name}.{os.uname().nodename}.tmp")
        try:
            with tempfile.TemporaryFile(dir=path.parent) as table, temporary.open("wb") as out:
                _sort(corpus, kind, seq_len, counts, table, advance)
                _write(layout, header, table, out, advance)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return header


def _sort(
    corpus: IndexedTokens, kind: Kind, seq_len: int, counts: Ints, table: BinaryIO, advance: Callable[[int], None]
) -> None:
    """Write the starts of all pieces, int64, the longest first and those of one length in the corpus's order.

    Args:
        counts: pieces of each length.
    """
    places = (counts[::-1].cumsum()[::-1] - counts).tolist()  # where the next of each length goes
    narrow = np.uint16 if seq_len < 2**16 else np.int64  # numpy sorts 16 bits by counting
    for some in pieces_of(corpus, kind, seq_len):
        order = np.argsort(some.lengths.astype(narrow), kind="stable")
        starts, lengths = some.starts[order], some.lengths[order]
        changes = np.flatnonzero(np.diff(lengths)) + 1
        for first, stop in pairwise([0, *changes.tolist(), len(order)] if len(order) else []):
            length = int(lengths[first])
            table.seek(8 * places[length])
            table.write(starts[first:stop].data)
            places[length] += stop - first
        advance(int(some.lengths.sum()))
    table.flush()


def _write(layout: Layout, header: Header, table: BinaryIO, out: BinaryIO, advance: Callable[[int], None]) -> None:
    """Write the index from the sorted starts."""
    out.write(HEADER.pack(*header))
    bounds_at = HEADER.size
    starts_at = bounds_at + 8 * (header.rows + 1)
    lengths_at = starts_at + 8 * header.pieces
    row = piece = 0
    for held, starts, lengths in _blocks(layout, header.pieces, table):
        bounds = piece + np.cumsum(held) - held
        for at, numbers in (
            (bounds_at + 8 * row, bounds),
            (starts_at + 8 * piece, starts),
            (lengths_at + 4 * piece, lengths),
        ):
            out.seek(at)
            out.write(numbers.data)
        row, piece = row + len(held), piece + len(starts)
        advance(int(lengths.sum(dtype=np.int64)))
    out.seek(bounds_at + 8 * row)
    out.write(np.array([piece], "<i8").data)


def _blocks(layout: Layout, pieces: int, table: BinaryIO) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Of some rows after others: pieces of each row, starts of the pieces, lengths of the pieces (int32)."""
    parts: list[tuple[Ints, Ints, Ints]] = []
    size = 0
    for band in layout.bands:
        held = layout.held[band.last]
        step = max(1, CHUNK // held)
        for first in range(band.first, band.stop, step):
            rows = min(step, band.stop - first)
            if size and size + rows * held > CHUNK:
                yield _joined(parts)
                parts, size = [], 0
            if not size:
                by_length = np.memmap(table, "<i8", "r", shape=(pieces,))  # anew: pages that were read are let go
            parts.append(_rows(layout, band.last, first, rows, by_length))
            size += rows * held
    if parts:
        yield _joined(parts)


def _rows(layout: Layout, portion: int, first: int, rows: int, by_length: Ints) -> tuple[Ints, Ints, Ints]:
    """The same of rows of one band, from `first` on."""
    held = layout.held[portion]
    starts, lengths = np.empty((rows, held), "<i8"), np.empty((rows, held), "<i4")
    while portion >= 0:
        each, stop = layout.each[portion], layout.held[portion]
        number = layout.base[portion] + first * each
        starts[:, stop - each : stop] = by_length[number : number + rows * each].reshape(rows, each)
        lengths[:, stop - each : stop] = layout.length[portion]
        portion = layout.before[portion]
    return np.full(rows, held), starts.ravel(), lengths.ravel()


def _joined(parts: list[tuple[Ints, Ints, Ints]]) -> tuple[Ints, Ints, Ints]:
    held, starts, lengths = (np.concatenate(of_each) for of_each in zip(*parts, strict=True))
    return held, starts, lengths
