"""Corpora as people have them: packed, in folders, by pattern, from a list, from a pipe, with bad lines."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tplaunch.data.build import build
from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.inputs import STDIN, files_from, raw_files, stdin_as_file
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import TplaunchError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_bpe(["some text"], 257, tmp_path / "bytes.model")
    return tmp_path / "bytes.model"


def documents(prefix: Path, tokenizer: Path) -> list[str]:
    corpus, codec = IndexedTokens.open(prefix), Tokenizer(tokenizer)
    return [codec.decode(corpus.document(number)[:-1]) for number in range(len(corpus))]


def line(text: object) -> bytes:
    return json.dumps({"meta": {"text": text}}).encode() + b"\n"


def test_a_folder_and_a_pattern_are_read_by_name(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.json.gz").write_bytes(gzip.compress(line("b")))
    (folder / "a.jsonl.bz2").write_bytes(bz2.compress(line("a")))
    (folder / "sub" / "c.json.xz").write_bytes(lzma.compress(line("c")))
    for name in ("tokenizer.json", "x.meta.json", "notes.md", ".hidden.txt"):
        (folder / name).write_text("no text")
    build([folder], tmp_path / "whole", tokenizer, "meta.text")
    assert documents(tmp_path / "whole", tokenizer) == ["a", "b", "c"]
    assert "3 files in the order of their names" in " ".join(capsys.readouterr().err.split())
    assert raw_files([folder / "*.json*"]) == [folder / "a.jsonl.bz2", folder / "b.json.gz"]
    (tmp_path / "list").write_text(f"{folder}/b.json.gz\n\n{folder}/a.jsonl.bz2\n")
    assert files_from(tmp_path / "list") == [folder / "b.json.gz", folder / "a.jsonl.bz2"]
    with pytest.raises(TplaunchError, match="no text in it"):
        raw_files([folder / "*.parquet"])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (line("x"), "stdin.jsonl"),
        (b"plain", "stdin.txt"),
        (gzip.compress(line("x"), mtime=0), "stdin.jsonl.gz"),
        (bz2.compress(b"plain"), "stdin.txt.bz2"),
        (lzma.compress(b" \n" + line("x")), "stdin.jsonl.xz"),
        (gzip.compress(b"cut off" * 99, mtime=0)[:-9], "stdin.txt.gz"),
        (b"", "stdin.txt"),
    ],
)
def test_standard_input(tmp_path: Path, content: bytes, name: str) -> None:
    with stdin_as_file([STDIN], tmp_path / "c", io.BytesIO(content)) as (path,):
        assert (path.name, path.read_bytes()) == (name, content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_messages_name_standard_input(
    tmp_path: Path, tokenizer: Path, pack: Callable[[bytes], bytes], capsys: pytest.CaptureFixture
) -> None:
    """Not the file that holds it meanwhile."""

    def refused(content: bytes, prefix: str = "c") -> str:
        with (
            pytest.raises(TplaunchError) as caught,
            stdin_as_file([STDIN], tmp_path / prefix, io.BytesIO(content)) as files,
        ):
            build(files, tmp_path / prefix, tokenizer)
        return str(caught.value)

    assert "-:2: not JSON" in refused(pack(b'{"text": "x"}\n{broken\n'))
    assert "-: byte 3: not UTF-8" in refused(pack(b"ab \xff"))
    assert "no text in -" in refused(pack(b'{"text": ""}\n'))
    if pack is not bytes:
        assert "-: byte " in (said := refused(pack(random.Random(1).randbytes(99_999).hex().encode())[:-20]))
        assert "cannot read it to its end" in said
    with stdin_as_file([STDIN], tmp_path / "d", io.BytesIO(pack(b'{"text": "x"}\n{broken\n'))) as files:
        build(files, tmp_path / "d", tokenizer, skip_bad=True)
    assert "left out: -:2: not JSON" in capsys.readouterr().err
    assert documents(tmp_path / "d", tokenizer) == ["x"]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("a.json", "jq -c '.[]' a.json > a.lines.jsonl"),
        ("a.jsonl", "jq -c '.[]' a.jsonl > a.lines.jsonl"),  # not into the file itself, which a shell empties first
        ("a.json.gz", "gzip -dc a.json.gz | jq -c '.[]' > a.lines.jsonl"),
    ],
)
def test_an_array_is_told_apart(tmp_path: Path, tokenizer: Path, name: str, fix: str) -> None:
    content = b'[\n{"text": "x"}]'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(TplaunchError, match="is one JSON array, not JSON lines") as caught:
        build([tmp_path / name], tmp_path / "c", tokenizer, skip_bad=True)
    assert f"fix: {fix}" in str(caught.value)


def test_bad_lines_are_left_out_when_asked(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    long_bad = line("z" * 3_000_000)[:-3] + b"\n"
    (tmp_path / "a.jsonl").write_bytes(
        line("a") + b"{broken\n" + line(5) + line(None) + long_bad + line("y" * 3_000_000) + b"{}\n" + line("b")
    )
    with pytest.raises(TplaunchError, match="not JSON"):
        build([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer, "meta.text")
    build([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer, "meta.text", skip_bad=True)
    assert documents(tmp_path / "c", tokenizer) == ["a", "y" * 3_000_000, "b"]
    assert "left out 5 lines or rows" in capsys.readouterr().err


def test_bad_rows_are_left_out_and_bytes_are_text(tmp_path: Path, tokenizer: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [b"a", None, b"\xff", "ü".encode()]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    build([tmp_path / "a.parquet"], tmp_path / "c", tokenizer, skip_bad=True)
    assert documents(tmp_path / "c", tokenizer) == ["a", "ü"]
