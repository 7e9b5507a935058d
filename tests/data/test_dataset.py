"""Samples cut from corpora, and the thread that reads them ahead."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from tplaunch.data.dataset import TokenDataset, prefetch
from tplaunch.data.indexed import IndexedWriter
from tplaunch.errors import TplaunchError
from tplaunch.recipe.schema import Source

DOCUMENTS = [5, 0, 12, 1, 1, 30]  # tokens of each


def write(prefix: Path, lengths: list[int], first: int = 0) -> Source:
    """A corpus whose tokens are first, first + 1, ..."""
    writer = IndexedWriter(prefix, np.dtype("<i4"))
    for length in lengths:
        writer.add(np.arange(first, first + length))
        writer.end_document()
        first += length
    writer.compose()
    writer.commit()
    return Source(path=str(prefix))


def test_samples_overlap_by_the_last_target(tmp_path: Path) -> None:
    dataset = TokenDataset([write(tmp_path / "a", DOCUMENTS)], seq_len=8, seed=1, shuffle=False)
    assert len(dataset) == 6  # (49 - 1) // 8
    batch = dataset.batch(np.array([0, 1, 5, 6]))
    assert batch.tokens.dtype == batch.targets.dtype == np.int64
    expected = np.array([np.arange(8), np.arange(8, 16), np.arange(40, 48), np.arange(8)])  # the last: from the start
    assert np.array_equal(batch.tokens, expected) and np.array_equal(batch.targets, expected + 1)


def test_an_epoch_covers_every_target_once(tmp_path: Path) -> None:
    dataset = TokenDataset([write(tmp_path / "a", [1001])], seq_len=10, seed=3)
    for epoch in range(3):
        batch = dataset.batch(np.arange(100 * epoch, 100 * (epoch + 1)))
        assert np.array_equal(np.sort(batch.targets.ravel()), np.arange(1, 1001))


def test_a_blend_reads_from_each_corpus(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [500]), write(tmp_path / "b", [500], first=1000)
    sources = [a.model_copy(update={"weight": 3.0}), b]
    dataset = TokenDataset(sources, seq_len=4, seed=1)
    firsts = dataset.batch(np.arange(1000)).tokens[:, 0]
    assert np.count_nonzero(firsts >= 1000) == 250


def test_positions_start_again_at_each_document(tmp_path: Path) -> None:
    dataset = TokenDataset([write(tmp_path / "a", DOCUMENTS)], seq_len=24, seed=1, shuffle=False)
    tokens, targets, positions, begins = dataset.batch(np.array([0, 1]), documents=True)
    assert np.array_equal(tokens, [np.arange(24), np.arange(24, 48)]) and np.array_equal(targets, tokens + 1)
    starts = np.array([*range(5), *range(12), 0, 0, *range(30)])
    assert positions is not None and begins is not None
    assert np.array_equal(positions[0], starts[:24])
    assert np.array_equal(positions[1], np.arange(24))  # counted from the sample's own start
    assert np.array_equal(begins[0], starts[1:25] == 0) and not begins[1].any()


def test_a_corpus_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a", [8])
    assert len(TokenDataset([source], seq_len=7, seed=1)) == 1
    with pytest.raises(TplaunchError, match=r"holds 8 tokens, less than one sample of 8 \+ 1"):
        TokenDataset([source], seq_len=8, seed=1)


class Reader:
    """Counts the steps that are read; 7 cannot be."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __call__(self, step: int) -> int:
        self.reads.append(step)
        if step == 7:
            raise OSError("input/output error")
        return step


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_prefetch_yields_every_step_in_order() -> None:
    assert list(prefetch(Reader(), 1, 6)) == [1, 2, 3, 4, 5]
    assert list(prefetch(Reader(), 3, 3)) == []
    assert not data_threads()


def test_prefetch_reads_no_further_ahead_than_asked() -> None:
    reader = Reader()
    batches = prefetch(reader, 10, 1000, ahead=3)
    assert next(batches) == 10
    batches.close()
    assert len(reader.reads) <= 4
    assert not data_threads()


def test_an_error_comes_at_its_own_step() -> None:
    batches = prefetch(Reader(), 5, 20)
    assert [next(batches) for _ in range(2)] == [5, 6]
    with pytest.raises(OSError, match="input/output error"):
        next(batches)
    assert not data_threads()


def test_thousands_of_corpora_take_few_open_files(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"c{number}", [17 + number % 50]) for number in range(600)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        dataset = TokenDataset(sources, seq_len=8, seed=1)
        first = dataset.batch(np.arange(1200)).tokens
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(dataset.batch(np.arange(1200)).tokens, first)
    corpus, _ = dataset.order.locate(np.arange(1200))
    assert np.bincount(corpus).tolist() == [2] * 600
