"""Files and samples against Megatron-Core itself, both directions.

Needs megatron-core, which the extra `test-interop` names: pip install -e '.[test-interop]'.
(`pip install --no-deps megatron-core==0.16.1` does where torch and numpy are there already.)
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tplaunch.data.build import build
from tplaunch.data.dataset import TokenDataset
from tplaunch.data.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path, token_dtype
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.recipe.schema import Source

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core warns that Transformer Engine and Apex are absent
PLAY = Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt"


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def documents(kinds: int) -> list[list[np.ndarray]]:
    """Fifty documents of 1 to 4 sequences; some sequences are empty, as Megatron allows."""
    draw = np.random.default_rng(7)
    return [[draw.integers(0, kinds, draw.integers(0, 40)) for _ in range(draw.integers(1, 5))] for _ in range(50)]


def write_ours(prefix: Path, dtype: np.dtype, content: list[list[np.ndarray]]) -> None:
    writer = IndexedWriter(prefix, dtype)
    for document in content:
        for sequence in document:
            writer.add(sequence)
            writer.end_sequence()
        writer.end_document()
    writer.compose()
    writer.commit()


def write_theirs(megatron: Any, prefix: Path, dtype: np.dtype, content: list[list[np.ndarray]]) -> None:
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype.type)
    for document in content:
        for sequence in document:
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))


@pytest.mark.parametrize("kinds", [1000, 100_000])
def test_the_same_files(megatron: Any, tmp_path: Path, kinds: int) -> None:
    dtype = token_dtype(kinds)
    assert dtype == np.dtype(megatron.DType.optimal_dtype(kinds))
    write_ours(tmp_path / "ours", dtype, documents(kinds))
    write_theirs(megatron, tmp_path / "theirs", dtype, documents(kinds))
    assert bin_path(tmp_path / "ours").read_bytes() == bin_path(tmp_path / "theirs").read_bytes()
    assert idx_path(tmp_path / "ours").read_bytes() == idx_path(tmp_path / "theirs").read_bytes()


def test_we_read_theirs(megatron: Any, tmp_path: Path) -> None:
    content = documents(1000)
    write_theirs(megatron, tmp_path / "c", np.dtype(np.int32), content)
    corpus = IndexedTokens.open(tmp_path / "c")
    corpus.verify()
    assert [corpus.document(n).tolist() for n in range(50)] == [np.concatenate(d).tolist() for d in content]


def test_they_read_what_we_prepare(megatron: Any, tmp_path: Path) -> None:
    speeches = PLAY.read_text().split("\n\n")
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": speech}) + "\n" for speech in speeches))
    build([tmp_path / "s.jsonl"], tmp_path / "c", 512)
    theirs = megatron.IndexedDataset(str(tmp_path / "c"))
    ours = IndexedTokens.open(tmp_path / "c")
    tokenizer = Tokenizer(tmp_path / "c.tokenizer.json")
    assert len(theirs) == len(ours) == len([speech for speech in speeches if speech])
    assert theirs.document_indices.tolist() == ours.documents.tolist()
    for number, speech in enumerate(filter(None, speeches)):
        assert np.array_equal(theirs[number], ours.document(number))
        assert tokenizer.decode(theirs[number]) == speech


def test_our_samples_are_their_tokens(megatron: Any, tmp_path: Path) -> None:
    """Sample j is tokens j * seq_len .. (j + 1) * seq_len of all of Megatron's sequences, one after the other."""
    write_theirs(megatron, tmp_path / "c", np.dtype(np.int32), documents(1000))
    theirs = megatron.IndexedDataset(str(tmp_path / "c"))
    row = list(chain.from_iterable(theirs[n].tolist() for n in range(len(theirs))))
    dataset = TokenDataset([Source(path=str(tmp_path / "c"))], seq_len=32, seed=11)
    places = dataset.order.locate(np.arange(len(dataset)))[1]
    assert sorted(places.tolist()) == list(range((len(row) - 1) // 32))
    found = dataset.batch(np.arange(len(dataset)))
    assert found.tokens.tolist() == [row[j * 32 : j * 32 + 32] for j in places.tolist()]
    assert found.targets.tolist() == [row[j * 32 + 1 : j * 32 + 33] for j in places.tolist()]
