"""The index of packed rows: built once, in bounded memory, mapped, and never believed."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.data.test_packing import one_by_one
from tests.recipes import case, resolved
from tplaunch.data import amounts as counting
from tplaunch.data import pieces, remembered, row_index
from tplaunch.data.amounts import amounts
from tplaunch.data.fitted import fit, fit_text
from tplaunch.data.indexed import IndexedTokens, IndexedWriter, idx_path
from tplaunch.data.packed import PackedDataset
from tplaunch.data.packing import count_rows
from tplaunch.data.prepare import prepare_recipe_data
from tplaunch.data.remembered import Remembered
from tplaunch.data.row_header import HEADER, Kind, rows_path
from tplaunch.data.row_index import RowIndex, key_of, ready_rows
from tplaunch.errors import TplaunchError
from tplaunch.recipe.schema import Recipe, Source

SEQ = 32
LENGTHS = [5, 31, 32, 33, 0, 70, 1, 64, 12, 20, 3, 3, 30]


def write(prefix: Path, lengths: list[int] | NDArray, learned: set[int] | None = None) -> IndexedTokens:
    """A corpus of documents of these lengths; or conversations, of which some tokens are learned, by their places."""
    writer = IndexedWriter(prefix, np.dtype("<u2"), loss=learned is not None)
    at = 0
    for length in lengths:
        loss = np.array([place in learned for place in range(at, at + length)], np.bool_) if learned else None
        writer.add(np.zeros(length, np.uint16), loss)
        if learned is not None:
            writer.end_sequence()
        writer.end_document()
        at += length
    writer.compose()
    writer.commit()
    return IndexedTokens.open(prefix)


def ready(corpus: IndexedTokens, cache: Path, kind: Kind = "text", seq_len: int = SEQ) -> RowIndex:
    key = key_of(corpus.prefix, kind, seq_len, Remembered(cache / "sums.json"))
    return ready_rows(corpus, kind, seq_len, cache, key)


def all_of(index: RowIndex) -> list[list[tuple[int, int]]]:
    return [index[row] for row in range(len(index))]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60), st.integers(1, 40), st.sampled_from([1, 3, 7, 1 << 21]))
def test_rows_are_those_of_the_rule(lengths: list[int], seq_len: int, chunk: int) -> None:
    """However many documents are looked at in one go, and however long they are."""
    expected = [
        (start + skipped, min(seq_len, length - skipped))
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True)
        for skipped in range(0, length, seq_len)
    ]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", chunk)
        patch.setattr(row_index, "CHUNK", chunk)
        corpus = write(Path(folder) / "c", lengths)
        counts = fit_text(str(corpus.prefix), seq_len)
        if not expected:
            with pytest.raises(TplaunchError, match="has no tokens"):
                ready(corpus, Path(folder) / "cache", seq_len=seq_len)
            assert not counts
            return
        found = all_of(ready(corpus, Path(folder) / "cache", seq_len=seq_len))
        assert found == [[expected[n] for n in row] for row in one_by_one([size for _, size in expected], seq_len)]
        assert count_rows(counts, seq_len) == len(found)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 40), st.sampled_from([1, 3, 1 << 21]))
def test_conversations_keep_what_is_learned(lengths: list[int], seq_len: int, chunk: int) -> None:
    ends = np.cumsum(lengths)
    learned = {-1, *(int(end) - 1 for end in ends[::2]), *(int(end) - 8 for end in ends[1::2])}
    starts = [int(end) - length for end, length in zip(ends, lengths, strict=True)]
    kept, lost = [], [0, 0]
    for start, length in zip(starts, lengths, strict=True):
        whole = length <= seq_len or any(place in learned for place in range(start, start + seq_len))
        kept.append(min(length, seq_len) if whole else 0)
        lost[not whole] += length > seq_len
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", chunk)
        patch.setattr(row_index, "CHUNK", chunk)
        corpus = write(Path(folder) / "c", lengths, learned)
        told = fit(str(corpus.prefix), seq_len)
        assert [told.truncated, told.dropped] == lost and told.documents == len(lengths)
        if any(kept):
            index = ready(corpus, Path(folder) / "cache", "chat", seq_len)
            assert all_of(index) == [[(starts[n], kept[n]) for n in row] for row in one_by_one(kept, seq_len)]
            assert [index.header.truncated, index.header.dropped] == lost and index.header.documents == len(lengths)
            assert count_rows(told.counts, seq_len) == len(index)


def test_building_takes_no_more_memory_with_more_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 1 << 13)
    monkeypatch.setattr(row_index, "CHUNK", 1 << 13)
    peaks = []
    for count in (20_000, 160_000):
        corpus = write(tmp_path / f"{count}", np.random.default_rng(0).integers(1, SEQ + 9, count))
        key = key_of(corpus.prefix, "text", SEQ, Remembered(tmp_path / "sums.json"))
        tracemalloc.start()
        try:
            index = ready_rows(corpus, "text", SEQ, tmp_path / "cache", key)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert index.header.pieces >= count
    assert peaks[1] < 1.2 * peaks[0]


BUILD = """
import sys, time
from pathlib import Path
from tplaunch.data import row_index
from tplaunch.data.packed import PackedDataset
from tplaunch.recipe.schema import Source
build = row_index._build
def logged(*args):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    return build(*args)
row_index._build = logged
print("ready", flush=True)
sys.stdin.readline()
print(len(PackedDataset("text", [Source(path=sys.argv[1])], 32, seed=1)))
"""


def test_of_two_processes_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))
    corpus = write(tmp_path / "c", LENGTHS)
    command = [sys.executable, "-c", BUILD, str(corpus.prefix), str(tmp_path / "log")]
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for rank in ranks:
        assert rank.stdout and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin
        rank.stdin.write("go\n")
        rank.stdin.flush()
    assert [rank.communicate()[0] for rank in ranks] == [f"{len(ready(corpus, tmp_path / 'cache'))}\n"] * 2
    assert (tmp_path / "log").read_text() == "built\n"
    assert [path.suffix for path in (tmp_path / "cache" / "rows").iterdir()] == [".rows"]


def cut(content: bytes) -> bytes:
    return content[:-1]


def longer(content: bytes) -> bytes:
    return content + b"\0"


def only_header(content: bytes) -> bytes:
    return content[: HEADER.size]


def nothing(content: bytes) -> bytes:
    return b""


def other_magic(content: bytes) -> bytes:
    return b"X" + content[1:]


def other_format(content: bytes) -> bytes:
    return content[:8] + b"\xff" + content[9:]


def of_something_else(content: bytes) -> bytes:
    return content[:20] + bytes([content[20] ^ 1]) + content[21:]


def negative_counts(content: bytes) -> bytes:
    return content[:48] + struct.pack("<q", -1) + content[56:]


@pytest.mark.parametrize(
    "damage", [cut, longer, only_header, nothing, other_magic, other_format, of_something_else, negative_counts]
)
def test_a_damaged_index_is_built_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    corpus = write(tmp_path / "c", LENGTHS)
    index = ready(corpus, tmp_path / "cache")
    content, expected = index.path.read_bytes(), all_of(index)
    index.path.write_bytes(damage(content))
    assert all_of(ready(corpus, tmp_path / "cache")) == expected
    assert index.path.read_bytes() == content


def test_another_corpus_has_another_index(tmp_path: Path) -> None:
    first = ready(write(tmp_path / "c", LENGTHS), tmp_path / "cache")
    same = ready(write(tmp_path / "d", LENGTHS), tmp_path / "cache")
    other = ready(write(tmp_path / "c", LENGTHS[::-1]), tmp_path / "cache")
    shorter = ready(IndexedTokens.open(tmp_path / "c"), tmp_path / "cache", seq_len=SEQ - 1)
    assert same.path == first.path, "the content says what it is, not the name"
    assert len({first.path, other.path, shorter.path}) == 3
    assert sorted(piece for row in all_of(other) for piece in row) != sorted(
        piece for row in all_of(first) for piece in row
    )


@pytest.mark.parametrize(
    ("section", "number"),
    [
        *(("bounds", number) for number in (-1, 10**6, 2**62, -(2**63))),
        *(("starts", number) for number in (-1, sum(LENGTHS), 2**63 - 1, -(2**63))),
        *(("lengths", number) for number in (0, -5, SEQ + 1, 2**31 - 1)),
    ],
)
def test_what_lies_outside_is_refused(tmp_path: Path, section: str, number: int) -> None:
    index = ready(write(tmp_path / "c", LENGTHS), tmp_path / "cache")
    header, row = index.header, len(index) - 2
    piece = int(index._bounds[row])
    at = {
        "bounds": HEADER.size + 8 * row,
        "starts": HEADER.size + 8 * (header.rows + 1) + 8 * piece,
        "lengths": HEADER.size + 8 * (header.rows + 1) + 8 * header.pieces + 4 * piece,
    }[section]
    with index.path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<i" if section == "lengths" else "<q", number))
    found = ready(IndexedTokens.open(tmp_path / "c"), tmp_path / "cache")
    with pytest.raises(TplaunchError, match=f"row {row} is damaged"):
        found[row]
    assert found[0]


def test_a_corpus_whose_index_is_damaged_is_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", LENGTHS)
    with idx_path(corpus.prefix).open("r+b") as file:
        file.seek(34 + 4 * len(corpus.lengths) + 8 * 3)
        file.write(struct.pack("<q", 10**6))
    with pytest.raises(TplaunchError, match="sequence 3 starts at byte 1000000"):
        ready(IndexedTokens.open(tmp_path / "c"), tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "rows").iterdir()]


READ = """
import sys
import numpy as np
from tplaunch.data.packed import PackedDataset
from tplaunch.recipe.schema import Source
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
def read(path, count):
    dataset = PackedDataset("text", [Source(path=path)], 32, seed=1)
    for first in range(0, count, 64):
        dataset.batch(np.arange(first, first + 64))
    return dataset
small = read(sys.argv[1], 64)
before = held()
large = read(sys.argv[2], 4096)
print(held() - before)
"""


def test_a_rank_holds_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is mapped: 36 MB of it would show."""
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "small", LENGTHS)
    count = 3_000_000
    lengths = np.full(count, 9, "<i4")
    with idx_path(tmp_path / "large").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1))
        file.write(lengths.data)
        file.write((np.arange(count, dtype="<i8") * 18).data)
        file.write(np.arange(count + 1, dtype="<i8").data)
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(18 * count)
    index = ready(IndexedTokens.open(tmp_path / "large"), tmp_path / "cache")
    assert index.path.stat().st_size > 36e6
    command = [sys.executable, "-c", READ, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 8_000, "KiB"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of a prepared corpus, whose files are remembered at once."""
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_SETTLED", -1.0)
    prefix = str(write(tmp_path / "c", LENGTHS).prefix)
    raw = case(training={"seq_len": SEQ, "micro_batch_size": 1}, model={"vocab_size": 20_000})
    return resolved({**raw, "data": {"train": prefix, "packing": "best_fit"}})


def refuse(*args: Any) -> Any:
    raise AssertionError("this was done before")


def sampled_sha256(path: Path) -> str:
    """In place of the function by whose name sums are remembered."""
    raise AssertionError(f"{path} is read again")


def test_a_launch_builds_for_its_ranks_and_for_plan(packed: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    (counted,) = amounts(packed)
    prepare_recipe_data(packed, progress=False)
    monkeypatch.setattr(row_index, "_build", refuse)
    monkeypatch.setattr(counting, "fit_text", refuse)
    monkeypatch.setattr(row_index, "sampled_sha256", sampled_sha256)
    dataset = PackedDataset("text", packed.data.sources("train"), SEQ, seed=1)
    (known,) = amounts(packed)
    assert known == counted and known.samples == len(dataset) == -(-sum(LENGTHS) // SEQ)


COUNT = """
import sys
from tplaunch.data.amounts import amounts
from tplaunch.recipe.schema import Recipe
print(amounts(Recipe.model_validate_json(sys.argv[1]))[0].samples, "numpy" in sys.modules)
"""


def test_plan_counts_rows_without_numpy(packed: Recipe) -> None:
    command = [sys.executable, "-c", COUNT, packed.model_dump_json(by_alias=True)]
    expected = f"{-(-sum(LENGTHS) // SEQ)} False\n"
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == expected
    prepare_recipe_data(packed, progress=False)
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == expected


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", LENGTHS)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(TplaunchError, match="cannot make the cache directory") as raised:
        ready(corpus, tmp_path / "cache")
    assert "TPLAUNCH_CACHE" in raised.value.problems[0].fix


def test_an_index_lies_under_its_key(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", LENGTHS)
    key = key_of(corpus.prefix, "text", SEQ, Remembered(tmp_path / "cache" / "sums.json"))
    index = ready_rows(corpus, "text", SEQ, tmp_path / "cache", key)
    assert index.path == rows_path(tmp_path / "cache", key) and index.header.key == key
    assert index.path.stat().st_size == index.header.size


def test_a_dataset_reads_from_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the cache was emptied while it was open."""
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))
    corpus = write(tmp_path / "c", LENGTHS)
    dataset = PackedDataset("text", [Source(path=str(corpus.prefix))], SEQ, seed=1)
    before = dataset.batch(np.arange(len(dataset)))
    ready(corpus, tmp_path / "cache").path.unlink()
    dataset._opened.cache_clear()
    after = dataset.batch(np.arange(len(dataset)))
    assert all((one == other).all() for one, other in zip(before, after, strict=True))
