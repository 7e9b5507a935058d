"""Megatron's indexed token files, `PREFIX.bin` and `PREFIX.idx`: read, written and verified.

The layout, little-endian (Megatron-Core, `megatron/core/datasets/indexed_dataset.py`):

    .idx   0   9 bytes   b"MMIDIDX\\x00\\x00"
           9   u64       version, 1
          17   u8        dtype code of the tokens (`DTYPES`)
          18   u64       S, number of sequences
          26   u64       D, number of document indices: documents + 1
          34   i32[S]    tokens of each sequence
               i64[S]    byte offset of each sequence in .bin
               i64[D]    0, then the number of sequences up to the end of each document
    .bin             tokens, back to back
"""

from __future__ import annotations

import os
import shutil
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from tplaunch.errors import Problem, TplaunchError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
_TOKEN_CODES = (1, 2, 3, 4, 5, 8)  # the integer ones
_CHUNK = 1 << 20  # elements looked at in one go


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule (`DType.optimal_dtype`): uint16 under 65,500 tokens, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def loss_path(prefix: Path) -> Path:
    """Of conversations, a byte for each token of .bin: 1 where it is a target, else 0."""
    return prefix.with_name(prefix.name + ".loss")


def open_loss(prefix: Path, tokens: int) -> NDArray[np.uint8]:
    """The content of that file, mapped, [tokens].

    Raises:
        TplaunchError: it is missing, or does not fit the tokens.
    """
    path = loss_path(prefix)
    size = path.stat().st_size if path.is_file() else -1
    if size < 0:
        raise TplaunchError(Problem(f"{path}: no such file", fix="prepare the conversations again"))
    if size != tokens:
        raise _damaged(path, min(size, tokens), f"{size:,} bytes, but {bin_path(prefix).name} has {tokens:,} tokens")
    return np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)


def _damaged(path: Path, offset: int, what: str, why: str = "") -> TplaunchError:
    return TplaunchError(
        Problem(what, why=why, where=f"{path}: byte {offset}", fix="copy the file again, or prepare the data again")
    )


@dataclass(frozen=True)
class IndexedTokens:
    """An opened corpus; its arrays are memory maps, nothing is held.

    Attributes:
        prefix: path without `.bin` or `.idx`.
        tokens: every token of the corpus in order, integer, shape [tokens].
        lengths: tokens of each sequence, int32, shape [S].
        pointers: byte offset of each sequence in .bin, int64, shape [S].
        documents: sequence at which each document starts, then S; int64, shape [documents + 1].
    """

    prefix: Path
    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]

    @classmethod
    def open(cls, prefix: Path | str) -> IndexedTokens:
        """Open `PREFIX.bin` and `PREFIX.idx`, checking the header and that the sizes agree.

        Raises:
            TplaunchError: a file is missing, is not such a file, or has another size than the index says;
                the file and the byte offset are named.
        """
        prefix = Path(prefix)
        idx, data = idx_path(prefix), bin_path(prefix)
        missing = [path for path in (data, idx) if not path.is_file()]
        if missing:
            raise TplaunchError(
                *(
                    Problem(f"{path}: no such file", fix=f"give the common prefix of a .bin and an .idx file: {prefix}")
                    for path in missing
                )
            )
        idx_size = idx.stat().st_size
        if idx_size < HEADER.size:
            raise _damaged(idx, idx_size, f"the file ends inside its header of {HEADER.size} bytes")
        with idx.open("rb") as file:
            magic, version, code, sequences, documents = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise _damaged(idx, 0, f"starts with {magic!r}: not a Megatron index", why=f"it must start with {MAGIC!r}")
        if version != 1:
            raise _damaged(idx, 9, f"version {version} of the index format is unknown; 1 is read")
        if code not in _TOKEN_CODES:
            raise _damaged(idx, 17, f"token dtype code {code} is not one of {', '.join(map(str, _TOKEN_CODES))}")
        if documents < 1:
            raise _damaged(idx, 26, "no document indices: there must be at least the leading 0")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if idx_size != expected:
            raise _damaged(
                idx,
                min(idx_size, expected),
                f"{idx_size:,} bytes, but {sequences:,} sequences and {documents:,} document indices take {expected:,}",
            )
        pointers_at = HEADER.size + 4 * sequences
        documents_at = pointers_at + 8 * sequences

        index = np.memmap(idx, np.uint8, "r")  # one for all sections: each keeps a file open

        def section(dtype: str, at: int, count: int) -> NDArray:
            return index[at : at + count * np.dtype(dtype).itemsize].view(dtype)

        lengths = section("<i4", HEADER.size, sequences)
        pointers = section("<i8", pointers_at, sequences)
        dtype, data_size = DTYPES[code], data.stat().st_size
        expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
        if data_size != expected:
            raise _damaged(
                data,
                min(data_size, max(expected, 0)),
                f"{data_size:,} bytes, but {idx.name} describes {expected:,}",
            )
        count = data_size // dtype.itemsize
        # An empty memmap is an error in numpy; an empty corpus is not one here.
        tokens = np.memmap(data, dtype, "r", 0, (count,)) if count else np.empty(0, dtype)
        return cls(prefix, tokens, lengths, pointers, section("<i8", documents_at, documents))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def document(self, number: int) -> NDArray[np.integer]:
        """Tokens of one document."""
        return self.tokens[self.document_start(number) : self.document_start(number + 1)]

    def document_start(self, number: int) -> int:
        """Position in `tokens` at which a document starts; the end of the last one for `len(self)`."""
        sequence = int(self.documents[number])
        if sequence == len(self.pointers):
            return len(self.tokens)
        return int(self.pointers[sequence]) // self.tokens.itemsize

    def starts_between(self, first: int, last: int) -> NDArray[np.int64]:
        """Positions in [first, last) of `tokens` at which documents start, ascending."""
        numbers = range(len(self))
        begin, end = (bisect_left(numbers, position, key=self.document_start) for position in (first, last))
        return np.array([self.document_start(number) for number in range(begin, end)], np.int64)

    def verify(self, *, sample: bool = False) -> None:
        """Check every entry of the index: lengths and pointers cover .bin without a gap, documents ascend.

        Args:
            sample: look at the first and the last million entries only.

        Raises:
            TplaunchError: naming the file and the byte offset of the first entry that is wrong.
        """
        idx = idx_path(self.prefix)
        expected, itemsize = 0, self.tokens.itemsize
        pointers_at = HEADER.size + 4 * len(self.lengths)
        for start in _starts(len(self.lengths), sample):
            expected = int(self.pointers[start]) if sample and start else expected
            lengths = np.asarray(self.lengths[start : start + _CHUNK], np.int64)
            pointers = np.asarray(self.pointers[start : start + _CHUNK], np.int64)
            if (bad := _first(lengths < 0)) is not None:
                raise _damaged(
                    idx,
                    HEADER.size + 4 * (start + bad),
                    f"sequence {start + bad} has length {lengths[bad]}",
                )
            ends = expected + np.cumsum(lengths) * itemsize
            starts = ends - lengths * itemsize
            if (bad := _first(pointers != starts)) is not None:
                raise _damaged(
                    idx,
                    pointers_at + 8 * (start + bad),
                    f"sequence {start + bad} starts at byte {pointers[bad]} of the .bin file, not at {starts[bad]}",
                    why="each sequence must start where the one before it ends",
                )
            expected = int(ends[-1])
        documents_at = pointers_at + 8 * len(self.lengths)
        before = 0
        for start in _starts(len(self.documents), sample):
            block = np.asarray(self.documents[start : start + _CHUNK], np.int64)
            if start == 0 and block[0] != 0:
                raise _damaged(idx, documents_at, f"the first document index is {block[0]}, not 0")
            if (bad := _first(np.diff(block, prepend=before) < 0)) is not None:
                raise _damaged(
                    idx,
                    documents_at + 8 * (start + bad),
                    f"document index {start + bad} is {block[bad]}, less than the one before it",
                )
            before = int(block[-1])
        if before != len(self.lengths):
            raise _damaged(
                idx,
                documents_at + 8 * (len(self.documents) - 1),
                f"the last document ends at sequence {before}, but there are {len(self.lengths):,} sequences",
            )

    def refuse_tokens(self, begin: int, size: int, vocab_size: int | None) -> None:
        """Name the first token of a range of bytes that is negative, or beyond the vocabulary.

        Raises:
            TplaunchError: naming the .bin file and the byte offset.
        """
        first, last = (offset // self.tokens.itemsize for offset in (begin, begin + size))
        tokens = self.tokens[first:last]
        if (bad := _first(tokens < 0)) is not None:
            raise self._outside(first + bad, "negative")
        if vocab_size is not None and (bad := _first(tokens >= vocab_size)) is not None:
            raise self._outside(first + bad, f"outside the vocabulary of {vocab_size:,}")

    def _outside(self, position: int, why: str) -> TplaunchError:
        return TplaunchError(
            Problem(
                f"token {self.tokens[position]} is {why}",
                where=f"{bin_path(self.prefix)}: byte {position * self.tokens.itemsize}",
                fix="raise model.vocab_size, or prepare the data with this model's tokenizer",
            )
        )


def _starts(count: int, sample: bool) -> Sequence[int]:
    """Where the chunks of a section of the index begin; of a sample, the first and the last."""
    if sample and count > 2 * _CHUNK:
        return 0, count - _CHUNK
    return range(0, count, _CHUNK)


def _first(wrong: NDArray[np.bool_]) -> int | None:
    """Index of the first True."""
    at = int(np.argmax(wrong)) if len(wrong) else 0
    return at if len(wrong) and wrong[at] else None


@dataclass(frozen=True)
class Written:
    """How far a writer has come: all that is needed to go on after an interruption."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0
    open_tokens: int = 0  # of the sequence not yet ended


class IndexedWriter:
    """Writes a corpus in constant memory: `add`, `end_document`, ..., `compose`, `commit`.

    Tokens, lengths and document indices go to `PREFIX.{bin,lengths,documents}.tmp` as they come; `compose` makes
    the index from them. Nothing is at the prefix itself before `commit`.

    Args:
        prefix: path without `.bin` or `.idx`.
        dtype: of the tokens, one of `DTYPES`.
        resume: what `sync` returned in an earlier process; anything written after it is cut off.
        loss: a file that says which tokens are targets is written, too (`loss_path`).

    Raises:
        TplaunchError: what was synced is not there any more.
    """

    def __init__(
        self, prefix: Path | str, dtype: np.dtype, resume: Written | None = None, *, loss: bool = False
    ) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._written = resume or Written()
        self._bin = self._open("bin", self._written.tokens * self.dtype.itemsize)
        self._lengths = self._open("lengths", self._written.sequences * 4)
        self._documents = self._open("documents", self._written.documents * 8)
        self._loss = self._open("loss", self._written.tokens) if loss else None

    def _temporary(self, name: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.{name}.tmp")

    def _open(self, name: str, size: int) -> BinaryIO:
        path = self._temporary(name)
        if size and not (path.exists() and path.stat().st_size >= size):
            raise TplaunchError(
                Problem(
                    f"cannot go on with {self.prefix}: {path.name} is shorter than it was",
                    fix=f"remove {self.prefix}.*.tmp and run again",
                )
            )
        file = path.open("rb+" if size else "wb+")
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, tokens: NDArray[np.integer], loss: NDArray[np.bool_] | None = None) -> None:
        """Append tokens to the open sequence.

        Args:
            loss: which of them are targets, where that is written.
        """
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        if self._loss is not None:
            assert loss is not None and loss.shape == tokens.shape
            self._loss.write(np.ascontiguousarray(loss, np.uint8).data)
        now = self._written
        self._written = replace(now, tokens=now.tokens + len(tokens), open_tokens=now.open_tokens + len(tokens))

    def end_sequence(self) -> None:
        """Close the open sequence, which may be empty.

        Raises:
            TplaunchError: it has 2**31 tokens or more, which the format cannot hold.
        """
        now = self._written
        if now.open_tokens >= 2**31:
            raise TplaunchError(
                Problem(
                    f"document {now.documents} has {now.open_tokens:,} tokens",
                    why="the format holds fewer than 2^31 in one",
                    fix="split it",
                )
            )
        self._lengths.write(struct.pack("<i", now.open_tokens))
        self._written = replace(now, sequences=now.sequences + 1, open_tokens=0)

    def end_document(self) -> None:
        """Close the document, and before it the open sequence where that holds tokens."""
        if self._written.open_tokens:
            self.end_sequence()
        self._documents.write(struct.pack("<q", self._written.sequences))
        self._written = replace(self._written, documents=self._written.documents + 1)

    def sync(self) -> Written:
        """Bring everything to disk; a new writer given the result goes on from here."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return self._written

    @property
    def _files(self) -> list[BinaryIO]:
        return [self._bin, self._lengths, self._documents, *([self._loss] if self._loss else [])]

    @property
    def loss_file(self) -> Path:
        """Where it says which tokens are targets, before `commit`."""
        return self._temporary("loss")

    def compose(self) -> tuple[Path, Path]:
        """Complete the files, still under their temporary names, and bring them to disk.

        Returns:
            the temporary .bin and .idx.
        """
        written = self.sync()
        index = self._temporary("idx")
        with index.open("wb") as out:
            out.write(HEADER.pack(MAGIC, 1, self._code, written.sequences, written.documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, out)
            self._lengths.seek(0)
            start = 0
            while block := self._lengths.read(4 * _CHUNK):
                sizes = np.frombuffer(block, "<i4").astype("<i8") * self.dtype.itemsize
                ends = start + np.cumsum(sizes)
                out.write((ends - sizes).data)
                start = int(ends[-1])
            out.write(struct.pack("<q", 0))
            self._documents.seek(0)
            shutil.copyfileobj(self._documents, out)
            out.flush()
            os.fsync(out.fileno())
        return self._temporary("bin"), index

    def commit(self) -> None:
        """Rename what `compose` made into place, .idx last, and remove the rest."""
        self.close()
        if self._loss is not None:
            self.loss_file.replace(loss_path(self.prefix))
        self._temporary("bin").replace(bin_path(self.prefix))
        self._temporary("idx").replace(idx_path(self.prefix))
        for name in ("lengths", "documents"):
            self._temporary(name).unlink()

    def close(self) -> None:
        """Close the temporary files and leave them."""
        for file in self._files:
            file.close()
