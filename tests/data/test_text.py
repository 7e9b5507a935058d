"""Raw text in blocks: nothing lost, tokens unchanged by the cuts, and unreadable input named by its place."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data import text
from tplaunch.data.encode import encode
from tplaunch.data.endings import is_raw
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import TplaunchError

SHAKESPEARE = Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt"


def texts(path: Path, key: str = "text") -> list[str]:
    """Of each block; the pieces of one document together."""
    found: list[str] = []
    goes_on = False
    for block in text.blocks(path, key):
        for one in block.texts(key):
            if goes_on:
                found[-1] += one
            else:
                found.append(one)
            goes_on = not block.ends
    return found


def refusal(path: Path) -> str:
    with pytest.raises(TplaunchError) as error:
        texts(path)
    return str(error.value)


@settings(deadline=None)
@given(content=st.text(st.sampled_from("ab é漢😀\n\n  ,."), min_size=1), size=st.integers(5, 40))
def test_blocks_of_a_text_make_it_whole(tmp_path_factory: pytest.TempPathFactory, content: str, size: int) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", size)
        blocks = list(text.blocks(path, "text"))
    assert "".join(one for block in blocks for one in block.texts("text")) == content
    assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert sum(block.read for block in blocks) == len(content.encode())


def test_cuts_leave_the_tokens_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SHAKESPEARE.read_text()
    train_bpe([whole], 1024, tmp_path / "t.json")
    tokenizer = Tokenizer(tmp_path / "t.json")
    monkeypatch.setattr(text, "BLOCK", 1000)
    blocks = list(text.blocks(SHAKESPEARE, "text", tokenizer.cuts))
    assert len(blocks) > 100 and max(len(block.payload) for block in blocks) < 3000
    assert np.array_equal(
        np.concatenate([encode(b, tokenizer, "text").tokens for b in blocks])[:-1], tokenizer.encode(whole)
    )


def test_a_packed_file_is_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK", 5000)
    path = tmp_path / "s.txt.gz"
    path.write_bytes(gzip.compress(SHAKESPEARE.read_bytes()))
    assert "".join(texts(path)) == SHAKESPEARE.read_text()
    assert sum(block.read for block in text.blocks(path, "text")) == path.stat().st_size


def write_jsonl(path: Path, documents: list[str]) -> None:
    lines = "".join(json.dumps({"body": document, "id": 1}) + "\n" for document in documents)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize("size", [10, 100, 1 << 20])
def test_each_line_of_a_jsonl_is_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(text, "BLOCK", size)
    documents = ["one", "two\nlines", "", "größer 漢😀", "x" * 300]
    write_jsonl(tmp_path / name, documents)
    found = texts(tmp_path / name, "body")
    assert list(filter(None, found)) == list(filter(None, documents))  # an empty one has no pieces


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "not JSON"),
        ("nonsense", "not JSON"),
        ('{"body": "a"}', "no field 'text'\n  why: its fields: body"),
        ("[1]", "no field 'text'\n  why: it is a list"),
        ('{"text": 5}', "the text must be a string, not int"),
        ('{"text": null}', "the text must be a string, not NoneType"),
        ('{"text": "\\ud800"}', "the text holds half of a surrogate pair"),
        ("[" * 100_000, "not JSON"),
    ],
)
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str, size: int) -> None:
    monkeypatch.setattr(text, "BLOCK", size)
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": "good"}\n' + line + "\n")
    assert refusal(path).startswith(f"{path}:4: {said}")


def test_text_that_is_not_utf8_is_named_by_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK", 16)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"some words and then gr\xf6\xdfer ones")
    assert refusal(path).startswith(f"{path}: byte 22: not UTF-8")


@pytest.mark.parametrize("place", [0, 20, 1000, -5, None])
def test_a_damaged_gzip_is_named(tmp_path: Path, place: int | None) -> None:
    path = tmp_path / "s.txt.gz"
    packed = bytearray(gzip.compress(SHAKESPEARE.read_bytes()))
    if place is None:
        del packed[-2000:]
    else:
        packed[place] ^= 0xFF
    path.write_bytes(packed)
    assert f"{path}: byte " in refusal(path)


def test_zstd_and_parquet(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = [f"document {n}" for n in range(1000)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "d.jsonl.zst").write_bytes(compress(lines[:5000]) + compress(lines[5000:]))  # two frames
    assert texts(tmp_path / "d.jsonl.zst") == documents
    parquet.write_table(pyarrow.table({"text": documents, "n": range(1000)}), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == documents
    assert sum(b.read for b in text.blocks(tmp_path / "d.parquet", "text")) == (tmp_path / "d.parquet").stat().st_size
    with pytest.raises(TplaunchError, match="no column 'body'"):
        texts(tmp_path / "d.parquet", "body")
    for damaged in (compress(lines)[:-20], compress(lines) + b"nonsense"):
        (tmp_path / "d.jsonl.zst").write_bytes(damaged)
        assert "d.jsonl.zst: byte" in refusal(tmp_path / "d.jsonl.zst")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nonsense")
    assert "d.parquet" in refusal(tmp_path / "d.parquet")


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / name).write_bytes(b"")
    assert f"fix: pip install {package}" in refusal(tmp_path / name)


def test_endings_tell_raw_text_from_prefixes() -> None:
    raw = ["a.txt", "a.jsonl", "a.b.jsonl.gz", "a.txt.zst", "a.parquet", "a.json.gz", "a.txt.bz2", "a.xz.jsonl.xz"]
    assert all(is_raw(Path(name)) for name in raw)
    assert not any(is_raw(Path(name)) for name in ["a", "a.bin", "a.gz", "txt", "a.txt.bin", "a.csv"])
