"""Megatron's .bin/.idx: the exact bytes, round trips, and damage refused with its place."""

from __future__ import annotations

import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data.corpus import verify_corpus
from tplaunch.data.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path, token_dtype
from tplaunch.data.progress import Progress
from tplaunch.errors import TplaunchError

# Three documents, the first of two sequences (5 and 3 tokens), then 7 and 1; as written by megatron-core 0.16.1.
SEQUENCES = [[[1, 2, 3, 4, 5], [6, 7, 8]], [[9, 10, 11, 12, 13, 14, 15]], [[16]]]
IDX = bytes.fromhex(
    "4d4d49444944580000"  # MMIDIDX
    "0100000000000000"  # version
    "08"  # uint16
    "0400000000000000"  # sequences
    "0400000000000000"  # document indices
    "05000000030000000700000001000000"  # lengths
    "00000000000000000a0000000000000010000000000000001e00000000000000"  # pointers
    "0000000000000000020000000000000003000000000000000400000000000000"  # document indices
)


def write(prefix: Path, documents: list[list[list[int]]], dtype: np.dtype) -> None:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        for sequence in document:
            writer.add(np.array(sequence, dtype))
            writer.end_sequence()
        writer.end_document()
    writer.compose()
    writer.commit()


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "a.b", SEQUENCES, np.dtype("<u2"))
    return tmp_path / "a.b"


def test_bytes_are_megatrons(prefix: Path) -> None:
    assert idx_path(prefix).read_bytes() == IDX
    assert len(IDX) == 114
    assert bin_path(prefix).read_bytes() == np.arange(1, 17, dtype="<u2").tobytes()
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_nothing_is_at_the_prefix_before_commit(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", np.dtype("<u2"))
    writer.add(np.arange(5))
    writer.end_document()
    writer.compose()
    assert not bin_path(tmp_path / "x").exists()
    assert not idx_path(tmp_path / "x").exists()
    writer.commit()
    assert len(IndexedTokens.open(tmp_path / "x")) == 1


@settings(deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=20), max_size=3), max_size=8),
    dtype=st.sampled_from(["<u2", "<i2", "<i4", "<i8"]),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: str) -> None:
    prefix = tmp_path_factory.mktemp("round") / "c"
    write(prefix, documents, np.dtype(dtype))
    corpus = IndexedTokens.open(prefix)
    corpus.verify()
    assert corpus.tokens.dtype == np.dtype(dtype)
    whole = [list(chain.from_iterable(document)) for document in documents]
    assert [corpus.document(n).tolist() for n in range(len(corpus))] == whole
    assert corpus.lengths.tolist() == [len(sequence) for document in documents for sequence in document]
    found = verify_corpus(prefix, Progress(False))
    assert found.whole and found.largest == max(chain.from_iterable(whole), default=-1)
    starts = np.cumsum([0, *map(len, whole)])[:-1]
    assert corpus.starts_between(3, 17).tolist() == [s for s in starts if 3 <= s < 17]


def test_a_writer_goes_on_from_the_last_sync(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write(whole, SEQUENCES, np.dtype("<u2"))
    first = IndexedWriter(parts, np.dtype("<u2"))
    first.add(np.array([1, 2, 3, 4, 5]))
    first.end_sequence()
    first.add(np.array([6]))
    synced = first.sync()
    first.add(np.array([99, 98]))  # lost by the interruption
    first.end_document()
    first.close()
    second = IndexedWriter(parts, np.dtype("<u2"), synced)
    second.add(np.array([7, 8]))
    second.end_document()
    for document in SEQUENCES[1:]:
        second.add(np.array(document[0]))
        second.end_document()
    second.compose()
    second.commit()
    assert idx_path(parts).read_bytes() == idx_path(whole).read_bytes()
    assert bin_path(parts).read_bytes() == bin_path(whole).read_bytes()


def test_token_dtype_is_megatrons_rule() -> None:
    assert token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")


def refusal(prefix: Path) -> str:
    with pytest.raises(TplaunchError) as error:
        IndexedTokens.open(prefix).verify()
    assert len(error.value.problems) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("offset", "format_", "value", "said", "at"),
    [
        (0, "<9s", b"NOTANINDX", "not a Megatron index", 0),
        (9, "<Q", 2, "version 2", 9),
        (17, "<B", 7, "dtype code 7", 17),
        (17, "<B", 99, "dtype code 99", 17),
        (18, "<Q", 5, "114 bytes, but 5 sequences", 114),
        (26, "<Q", 0, "no document indices", 26),
        (34, "<i", 4, "sequence 1 starts at byte 10 of the .bin file, not at 8", 58),
        (38, "<i", -3, "sequence 1 has length -3", 38),
        (58, "<q", 12, "sequence 1 starts at byte 12", 58),
        (82, "<q", 1, "the first document index is 1", 82),
        (90, "<q", 4, "document index 2 is 3, less than", 98),
        (106, "<q", 5, "the last document ends at sequence 5", 106),
    ],
)
def test_a_wrong_entry_is_named(prefix: Path, offset: int, format_: str, value: object, said: str, at: int) -> None:
    damaged = bytearray(IDX)
    struct.pack_into(format_, damaged, offset, value)
    idx_path(prefix).write_bytes(damaged)
    message = refusal(prefix)
    assert said in message
    assert message.startswith(f"{idx_path(prefix)}: byte {at}: ")


@pytest.mark.parametrize("size", range(len(IDX)))
def test_a_truncated_index_is_refused_where_it_ends(prefix: Path, size: int) -> None:
    idx_path(prefix).write_bytes(IDX[:size])
    assert refusal(prefix).startswith(f"{idx_path(prefix)}: byte {size}: ")


@pytest.mark.parametrize("change", [-32, -7, -1, 1, 2])
def test_a_bin_of_another_size_is_refused(prefix: Path, change: int) -> None:
    data = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes((data + b"\0\0")[: len(data) + change])
    message = refusal(prefix)
    assert message.startswith(f"{bin_path(prefix)}: byte {min(32, 32 + change)}: {32 + change} bytes, but a.b.idx")


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(TplaunchError) as error:
        IndexedTokens.open(tmp_path / "nothing")
    assert [problem.what for problem in error.value.problems] == [
        f"{tmp_path}/nothing.bin: no such file",
        f"{tmp_path}/nothing.idx: no such file",
    ]


def test_a_token_beyond_the_vocabulary_is_named(prefix: Path) -> None:
    verify_corpus(prefix, Progress(False), vocab_size=17)
    with pytest.raises(TplaunchError, match=rf"{bin_path(prefix)}: byte 24: token 13 is outside the vocabulary of 13"):
        verify_corpus(prefix, Progress(False), vocab_size=13)


def test_a_negative_token_is_named(tmp_path: Path) -> None:
    write(tmp_path / "n", [[[3, 4, -5]]], np.dtype("<i4"))
    with pytest.raises(TplaunchError, match=r"n\.bin: byte 8: token -5 is negative"):
        verify_corpus(tmp_path / "n", Progress(False))
