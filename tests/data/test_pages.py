"""Parquet columns with large pages, read from the file itself, against pyarrow's own reading of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tplaunch.data.text import blocks
from tplaunch.errors import TplaunchError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from tplaunch.data import pages  # noqa: E402

WORDS = "Whether 'tis nobler in the mind, à la façon, to suffer 苦しみ the slings and arrows. "
LONG = "".join(f"{n} {WORDS}" for n in range(3000))
TEXTS = ["short", LONG, None, "", LONG[::-1], "short", None, LONG, *(f"{n}{WORDS}" for n in range(3000)), LONG[1:]]
CODECS = ("none", "snappy", "gzip", "zstd", "brotli")


def own(path: Path, name: str) -> Iterator[bytes | None] | None:
    """The values as `pages` reads them; None where it leaves one of the row groups to pyarrow."""
    table = parquet.ParquetFile(path)
    columns = [table.schema.column(number) for number in range(len(table.schema))]
    number = next(number for number, column in enumerate(columns) if column.path == name)
    found: list[bytes | None] = []
    with path.open("rb") as file:
        for group in range(table.num_row_groups):
            values = pages.large_values(file, table.metadata.row_group(group).column(number), columns[number])
            if values is None:
                return None
            found += [None if one is None else b"".join(one.parts()) for one in values]
    return iter(found)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LARGE", 100_000)
    monkeypatch.setattr(pages, "PART", 1 << 17)


@pytest.mark.parametrize(("codec", "version", "dictionary"), [*product(CODECS, ("1.0", "2.0"), (False, True))])
def test_large_pages_are_read_as_pyarrow_reads_them(tmp_path: Path, codec: str, version: str, dictionary: bool) -> None:
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, path, compression=codec, data_page_version=version, use_dictionary=dictionary)
    values = own(path, "text")
    assert values is not None
    assert [None if one is None else one.decode() for one in values] == TEXTS


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_fields_of_structs_and_columns_without_nulls(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "t.parquet"
    meta = [None, {"text": None}, {"text": LONG}, {"text": "short"}, {"text": LONG}]
    body = [LONG.encode(), b"", b"a", LONG.encode(), b"b"]
    schema = pyarrow.schema([
        pyarrow.field("meta", pyarrow.struct([("text", pyarrow.large_string())])),
        pyarrow.field("body", pyarrow.binary(), nullable=False),
    ])  # fmt: skip
    table = pyarrow.table({"meta": meta, "body": body}, schema=schema)
    parquet.write_table(table, path, compression=codec, row_group_size=3, use_dictionary=["body"])
    inside = [one["text"].encode() if one and one["text"] else None for one in meta]
    assert parquet.ParquetFile(path).num_row_groups == 2
    assert list(own(path, "meta.text") or ()) == inside
    assert list(own(path, "body") or ()) == body


def test_what_it_does_not_know_is_left_to_pyarrow(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    texts = [one or "" for one in TEXTS]
    for options in ({"compression": "lz4"}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}):
        parquet.write_table(pyarrow.table({"text": texts}), path, **options)
        assert own(path, "text") is None
        assert joined(path) == [one for one in texts if one]
    parquet.write_table(pyarrow.table({"text": ["short"] * 1000}), path)
    assert own(path, "text") is None, "small pages are pyarrow's"


def joined(path: Path, **options: Any) -> list[str]:
    """The documents of a file, put together from its blocks."""
    found, open_ = [], ""
    for block in blocks(path, "text", **options):
        for text in block.texts("text"):
            open_ += text
            if block.ends and open_:
                found.append(open_)
                open_ = ""
    return found


@pytest.mark.parametrize("skip_bad", [False, True])
def test_blocks_are_the_same_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad: bool) -> None:
    path = tmp_path / "t.parquet"
    longest = LONG * 8
    monkeypatch.setattr(pages, "PART", 1 << 20)
    parquet.write_table(pyarrow.table({"text": ["a", longest, "b", longest, *(["c" + WORDS] * 2000)]}), path)
    ours = [(b.kind, b.payload, b.first, b.ends, b.before) for b in blocks(path, "text", skip_bad=skip_bad)]
    assert {kind for kind, *_ in ours} == {"rows", "piece"}
    assert joined(path) == ["a", longest, "b", longest, *(["c" + WORDS] * 2000)]
    monkeypatch.setattr(pages, "LARGE", 10**9)
    theirs = [(b.kind, b.payload, b.first, b.ends, b.before) for b in blocks(path, "text", skip_bad=skip_bad)]
    assert [one for one in ours if one[0] == "piece"] == [one for one in theirs if one[0] == "piece"]


def test_a_fragment_that_refers_to_the_one_before_is_unpacked_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No writer known to us makes these, and the format allows them."""
    literal = b"\xf4\xff\xff" + bytes(range(256)) * 256  # 65,536 bytes as they are
    back = bytes([0b11111111, 0, 0, 1, 0]) * 1024  # 64 bytes from 65,536 bytes before, a thousand times
    stream = pages._varint(131_072) + literal + back
    whole = pyarrow.Codec("snappy").decompress(stream, 131_072, asbytes=True)
    assert b"".join(pages._snappy_parts(iter([stream]))) == whole  # one part here
    monkeypatch.setattr(pages, "PART", 1 << 16)
    with pytest.raises(OSError, match=r"(?i)snappy"):
        list(pages._snappy_parts(iter([stream])))
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as unpacked:
        file.write(stream)
        pages._copy_unpacked(file, 0, len(stream), 131_072, "snappy", unpacked)
        unpacked.seek(0)
        assert unpacked.read() == whole


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", LONG]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[100:40_000] = bytes(39_900)
    path.write_bytes(content)
    with pytest.raises(TplaunchError, match="cannot read it as Parquet"):
        joined(path)
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(TplaunchError, match="cannot read it as Parquet"):
        joined(path)
