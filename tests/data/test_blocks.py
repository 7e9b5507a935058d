"""Large corpora: a start reads a sample of them, `data inspect --verify` all, and both name what is damaged."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tplaunch.cli.main import run
from tplaunch.data.blocks import block_sums, look, sample_of
from tplaunch.data.build import build
from tplaunch.data.corpus import Meta, meta_path, verify_corpus
from tplaunch.data.dataset import TokenDataset
from tplaunch.data.fingerprint import corpus_facts
from tplaunch.data.indexed import HEADER, MAGIC, bin_path, idx_path
from tplaunch.data.progress import Progress
from tplaunch.data.remembered import remembered
from tplaunch.errors import TplaunchError
from tplaunch.files import sha256_file
from tplaunch.recipe.schema import Source

SMALL_BLOCK = 4096


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared corpus of some fifty blocks."""
    lines = (json.dumps({"text": f"{n} times seven is {7 * n}, and its square is {n * n}."}) for n in range(4000))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    build([tmp_path / "a.jsonl"], tmp_path / "c", 300, progress=False)
    described = json.loads(meta_path(tmp_path / "c").read_text())
    files = {"bin_blocks": bin_path(tmp_path / "c"), "idx_blocks": idx_path(tmp_path / "c")}
    assert all(described[name] == [sha256_file(path)] for name, path in files.items())  # one block each, so far
    described |= {name: block_sums(path, SMALL_BLOCK) for name, path in files.items()}
    meta_path(tmp_path / "c").write_text(json.dumps(described | {"block_bytes": SMALL_BLOCK}))
    return tmp_path / "c"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damaged_places_are_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bin_path(corpus)
    assert data.stat().st_size > 40 * SMALL_BLOCK
    assert verify_corpus(corpus, Progress(False), whole=True).whole
    sampled = sample_of(len(Meta.read(corpus).bin_blocks))  # type: ignore[union-attr]
    unsampled = next(n for n in range(1, 30) if not {n, n + 1} & set(sampled))
    flip(data, unsampled * SMALL_BLOCK)
    flip(data, (unsampled + 2) * SMALL_BLOCK - 1)
    assert not verify_corpus(corpus, Progress(False)).whole
    begin, end = unsampled * SMALL_BLOCK, (unsampled + 2) * SMALL_BLOCK - 1
    with pytest.raises(TplaunchError, match=rf"c\.bin: bytes {begin:,} to {end:,} are not what was prepared"):
        verify_corpus(corpus, Progress(False), whole=True)
    assert run(["data", "inspect", str(corpus)]) == 0
    assert "a sample; --verify checks the whole" in capsys.readouterr().out
    assert run(["data", "inspect", str(corpus), "--verify"]) == 2
    assert f"bytes {begin:,} to {end:,}" in capsys.readouterr().err
    flip(data, sampled[1] * SMALL_BLOCK + 7)
    with pytest.raises(TplaunchError, match="are not what was prepared"):
        verify_corpus(corpus, Progress(False))


def test_a_corpus_of_an_earlier_version_is_checked_as_a_whole(corpus: Path) -> None:
    described = json.loads(meta_path(corpus).read_text())
    for name in ("block_bytes", "bin_blocks", "idx_blocks"):
        del described[name]
    described |= {"bin_sha256": sha256_file(bin_path(corpus)), "idx_sha256": sha256_file(idx_path(corpus))}
    meta_path(corpus).write_text(json.dumps(described))
    assert verify_corpus(corpus, Progress(False)).whole
    flip(bin_path(corpus), 30_000)
    with pytest.raises(TplaunchError, match=r"c\.bin: bytes 0 to .* are not what was prepared"):
        verify_corpus(corpus, Progress(False), whole=True)


def sparse(prefix: Path, tokens: int, last: int = 0) -> Path:
    """A corpus of another maker, of documents of 10**9 zeros, that takes no room on the disk."""
    lengths = [10**9] * (tokens // 10**9) or [tokens]
    ends = np.cumsum(lengths)
    with idx_path(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, len(lengths), len(lengths) + 1))
        file.write(np.array(lengths, "<i4").tobytes() + ((ends - lengths) * 2).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    with bin_path(prefix).open("wb") as file:
        file.truncate(2 * tokens)
        file.seek(2 * (tokens // 2))
        file.write(np.array([last], "<u2").tobytes())
    return prefix


def start_time(prefix: Path) -> float:
    """CPU seconds of all that a launch and a rank do with a corpus before the first batch."""
    begun = time.process_time()
    verify_corpus(prefix, Progress(False), vocab_size=1000)
    with remembered(prefix.parent / "cache") as sums:
        corpus_facts(prefix, sums)
    TokenDataset([Source(path=str(prefix))], 64, 1).batch(np.arange(8))
    return time.process_time() - begun


def test_a_large_corpus_starts_as_fast_as_a_small_one(tmp_path: Path) -> None:
    small = start_time(sparse(tmp_path / "small", 10**5))
    large = start_time(sparse(tmp_path / "large", 10**10))
    assert bin_path(tmp_path / "large").stat().st_size == 20 * 10**9
    assert large - small < 2.0


def test_a_token_that_the_start_did_not_see_is_refused_when_it_is_read(tmp_path: Path) -> None:
    prefix = sparse(tmp_path / "large", 10**9, last=5000)
    assert verify_corpus(prefix, Progress(False), vocab_size=1000).largest == 0
    dataset = TokenDataset([Source(path=str(prefix))], 100, 1, shuffle=False, vocab_size=1000)
    dataset.batch(np.array([0]))
    with pytest.raises(TplaunchError, match=r"large\.bin: byte 1000000000: token 5000 is outside the vocabulary"):
        dataset.batch(np.array([10**9 // 2 // 100]))


def test_large_raw_text_is_not_read_whole_to_know_it(tmp_path: Path) -> None:
    from tplaunch.data.fingerprint import text_sha256

    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(10 * 10**9)
    begun = time.process_time()
    first = text_sha256(path)
    assert time.process_time() - begun < 2.0
    with path.open("rb+") as file:
        file.seek(5_000_000_123)
        file.write(b"x")
    assert text_sha256(path) != first


def test_a_sample_of_blocks_is_spread() -> None:
    assert sample_of(5) == [0, 1, 2, 3, 4]
    assert sample_of(1000, 4) == [0, 333, 666, 999]
    assert sample_of(1000, 2) == [0, 999]
    assert sample_of(1000, 1) == [0]
    assert len(set(sample_of(9))) == 8 and sample_of(9)[-1] == 8
    assert sample_of(0) == []


def test_a_block_is_told_of_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    told: list[int] = []
    path.write_bytes(np.array([7, 3, 9, 1, 5], "<u2").tobytes())
    found = list(look(path, range(4), np.dtype("<u2"), block=4, advance=told.append))
    assert [(one.number, one.smallest, one.largest) for one in found] == [(0, 3, 7), (1, 1, 9), (2, 5, 5), (3, 0, -1)]
    assert told == [1, 1, 1, 1]
    assert [one.largest for one in look(path, [0], block=4)] == [-1]
