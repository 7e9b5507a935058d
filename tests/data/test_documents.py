"""The length of documents by which attention is counted, against the positions that a run reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.recipes import case
from tplaunch.data import documents
from tplaunch.data.dataset import TokenDataset
from tplaunch.data.documents import document_lengths, with_document_length
from tplaunch.data.indexed import IndexedWriter
from tplaunch.recipe.schema import Recipe, Source
from tplaunch.spec.attention import tokens_seen


def write(prefix: Path, lengths: list[int]) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for length in lengths:
        writer.add(np.zeros(length, np.uint16))
        writer.end_document()
    writer.compose()
    writer.commit()
    return str(prefix)


def recipe(train: object, seq_len: int = 64, **training: object) -> Recipe:
    raw = case(1, 1, training={"seq_len": seq_len, "document_mask": True, **training})
    return Recipe.model_validate(raw | {"data": {"train": train}})


def drawn(seed: int, mean: float, count: int) -> list[int]:
    return [1 + int(x) for x in np.random.default_rng(seed).exponential(mean, count)]


@pytest.mark.parametrize("mean", [5, 40, 500])
def test_as_many_tokens_are_seen_as_in_the_run(tmp_path: Path, mean: int) -> None:
    lengths = drawn(0, mean, 3000)
    prefix = write(tmp_path / "c", lengths)
    assert document_lengths(prefix) == lengths
    length = with_document_length(recipe(prefix)).data.document_length
    dataset = TokenDataset([Source(path=prefix)], 64, 1)
    positions = dataset.batch(np.arange(len(lengths) * min(mean, 64) // 80), documents=True).positions
    assert positions is not None
    seen = positions.mean() + 0.5
    assert tokens_seen(64, document=length) == pytest.approx(seen, rel=0.05)


def test_of_many_documents_a_sample_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "c", drawn(1, 30, 5000))
    whole = with_document_length(recipe(prefix)).data.document_length
    monkeypatch.setattr(documents, "_LOOKED_AT", 500)
    assert len(document_lengths(prefix)) == 500
    assert with_document_length(recipe(prefix)).data.document_length == pytest.approx(whole, rel=0.1)


def test_corpora_count_by_what_is_read_of_them(tmp_path: Path) -> None:
    short, long = write(tmp_path / "short", [10] * 500), write(tmp_path / "long", [1000] * 50)
    weighed = [{"path": short, "weight": 3.0}, {"path": long, "weight": 1.0}]
    length = with_document_length(recipe(weighed, seq_len=4096)).data.document_length
    expected = 0.75 * tokens_seen(4096, document=10) + 0.25 * tokens_seen(4096, document=1000)
    assert tokens_seen(4096, document=length) == pytest.approx(expected, rel=0.01)


def test_what_the_recipe_says_holds_until_there_are_data(tmp_path: Path) -> None:
    missing = recipe(str(tmp_path / "none"))
    given = missing.model_copy(update={"data": missing.data.model_copy(update={"document_length": 7})})
    assert with_document_length(given) is given
    assert with_document_length(missing).data.document_length is None
    prefix = write(tmp_path / "none", [20] * 100)
    assert prefix == str(tmp_path / "none")
    assert with_document_length(given).data.document_length == 20
    assert with_document_length(recipe(prefix, document_mask=False)).data.document_length is None
    (tmp_path / "none.idx").write_bytes(b"damaged")
    assert document_lengths(prefix) == []
