"""Rows of whole documents of text (`data.packing: best_fit`)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recipes import case, resolved
from tplaunch.data.amounts import amounts
from tplaunch.data.fingerprint import data_facts
from tplaunch.data.indexed import IndexedTokens, IndexedWriter
from tplaunch.data.packed import PackedDataset
from tplaunch.errors import TplaunchError
from tplaunch.launch.resume import data_changes
from tplaunch.recipe.schema import Recipe, Source

SEQ = 32
LENGTHS = [5, 31, 32, 33, 0, 70, 1, 64, 12, 20, 3, 3, 30]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Every token tells its document and place; of document 1 in two sequences."""
    prefix = tmp_path / "corpus"
    writer = IndexedWriter(prefix, np.dtype("<i4"))
    for number, length in enumerate(LENGTHS):
        tokens = 1000 * number + np.arange(length)
        writer.add(tokens[:4])
        if number == 1:
            writer.end_sequence()
        writer.add(tokens[4:])
        writer.end_document()
    writer.compose()
    writer.commit()
    return str(prefix)


def recipe(corpus: str, packing: str | None = "best_fit", **training: Any) -> Recipe:
    raw = case(training={"seq_len": SEQ, "micro_batch_size": 1, **training}, model={"vocab_size": 20_000})
    return resolved({**raw, "data": {"train": corpus, "packing": packing}})


def pieces(found: Any) -> list[list[int]]:
    """Tokens of each piece, by positions; without what fills rows up, which is no target."""
    kept = []
    for tokens, loss, positions in zip(*found, strict=True):
        bounds = [*np.flatnonzero(positions == 0), SEQ]
        assert all(positions[start:end].tolist() == list(range(end - start)) for start, end in pairwise(bounds))
        kept += [tokens[start:end].tolist() for start, end in pairwise(bounds) if loss[start:end].all()]
        assert all(loss[start:end].all() or not loss[start:end].any() for start, end in pairwise(bounds))
    return kept


def test_only_documents_longer_than_a_row_are_cut(corpus: str) -> None:
    dataset = PackedDataset("text", [Source(path=corpus)], SEQ, seed=3)
    found = dataset.batch(np.arange(len(dataset)))
    expected = []
    for number, length in enumerate(LENGTHS):
        whole = (1000 * number + np.arange(length)).tolist()
        expected += [whole[start : start + SEQ] for start in range(0, length, SEQ)]
    assert sorted(pieces(found)) == sorted(expected)
    assert found.loss.sum() == len(IndexedTokens.open(corpus).tokens) == sum(LENGTHS)
    (amount,) = amounts(recipe(corpus))
    assert amount.samples == len(dataset) == -(-sum(LENGTHS) // SEQ), "they fill rows well"


@pytest.mark.parametrize("document_mask", [False, True])
def test_targets_follow_in_their_document_or_row(corpus: str, document_mask: bool) -> None:
    from tplaunch.parallel.cross_entropy import IGNORE
    from tplaunch.train.batch import make_batch, masks_targets, open_dataset

    asked = recipe(corpus, document_mask=document_mask)
    dataset = open_dataset(asked, asked.data.sources("train"), shuffle=False)
    batch = make_batch(asked, dataset, range(len(dataset)))
    assert masks_targets(asked) and batch.tokens.shape == (len(dataset), SEQ)
    assert (batch.positions is not None) == document_mask
    crossed = 0
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        for place in range(SEQ - 1):
            if labels[place] == IGNORE:
                continue
            assert labels[place] == tokens[place + 1]
            crossed += labels[place] != tokens[place] + 1
        assert labels[-1] == IGNORE
    assert (crossed == 0) == document_mask


def test_how_rows_are_filled_is_part_of_what_the_data_are(corpus: str, tmp_path: Path) -> None:
    packed, other = (data_facts(recipe(corpus, packing), tmp_path / "cache") for packing in ("best_fit", None))
    assert data_changes(other, packed) == {"data.packing": ("concatenate", "best_fit")}
    del other["packs"]  # of an earlier version
    assert data_changes(other, packed) and not data_changes(packed, packed)


def test_tokens_beyond_the_vocabulary_are_named(corpus: str) -> None:
    dataset = PackedDataset("text", [Source(path=corpus)], SEQ, seed=3, vocab_size=12_000)
    with pytest.raises(TplaunchError, match=r"token 12\d\d\d is outside the vocabulary of 12,000"):
        dataset.batch(np.arange(len(dataset)))
