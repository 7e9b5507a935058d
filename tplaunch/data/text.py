"""Raw text read in blocks of bounded size: .txt, .jsonl (each plain, .gz or .zst) and .parquet."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from tplaunch.data.endings import FORMAT
from tplaunch.errors import Problem, TplaunchError

BLOCK = 1 << 20  # bytes of text that are tokenized in one go
# Places where no byte-level pre-tokenizer joins what stands left and right: after the end of a line and before
# a single space, each between two printed characters. Cutting there leaves the tokens as they were.
_CUTS = (re.compile(rb"\S\n(?=\S)"), re.compile(rb"\S(?= \S)"))

_KEY = "name the one that holds the text: data.text_key in a recipe, --text-key on the command line"


@dataclass(frozen=True)
class Block:
    """A piece of an input: some lines of a .jsonl, some rows of a table, or a part of a .txt document.

    Attributes:
        path: the input.
        kind: of the payload.
        payload: whole lines as bytes, rows as strings, or UTF-8 text as bytes.
        first: line number of the first line (jsonl) or byte offset (txt), for messages.
        ends: whether the document of a .txt ends here.
        read: bytes of the input file consumed since the block before, for progress.
    """

    path: Path
    kind: str
    payload: bytes | list[Any]
    first: int
    ends: bool
    read: int

    def texts(self, text_key: str) -> list[str]:
        """The texts of the block: one a document, or one part of a document (txt).

        Raises:
            TplaunchError: not UTF-8, not JSON, or without the text; the place is named.
        """
        if self.kind == "jsonl":
            assert isinstance(self.payload, bytes)
            lines = self.payload.split(b"\n")
            return [
                _json_text(line, text_key, self.path, n) for n, line in enumerate(lines, self.first) if line.strip()
            ]
        if self.kind == "parquet":
            return [_checked(row, f"{self.path}: row {n}") for n, row in enumerate(self.payload, self.first)]
        assert isinstance(self.payload, bytes)
        try:
            return [self.payload.decode("utf-8")]
        except UnicodeDecodeError as error:
            raise TplaunchError(
                Problem(
                    "not UTF-8",
                    where=f"{self.path}: byte {self.first + error.start}",
                    fix=f"convert it, for example: iconv -f latin1 -t utf-8 {shlex.quote(self.path.name)}",
                )
            ) from None


def blocks(path: Path, text_key: str) -> Iterator[Block]:
    """Blocks of an input, in order; a function of the file's bytes alone.

    Raises:
        TplaunchError: the format's library is missing, or the packed file is damaged.
    """
    match = FORMAT.search(path.name)
    assert match is not None, "callers ask is_raw first"
    if match["table"]:
        yield from _parquet_blocks(path, text_key)
        return
    with path.open("rb") as raw:
        stream = _unpack(raw, match["packed"] or "", path)
        read_blocks = _jsonl_blocks if match["lines"] == "jsonl" else _txt_blocks
        before = 0
        try:
            for payload, first, ends in read_blocks(stream):
                yield Block(path, match["lines"], payload, first, ends, raw.tell() - before)
                before = raw.tell()
        except (EOFError, OSError, zlib.error) as error:
            raise TplaunchError(
                Problem(f"cannot read it to its end: {error}", where=f"{path}: byte {raw.tell()}")
            ) from None


def _jsonl_blocks(stream: BufferedIOBase) -> Iterator[tuple[bytes, int, bool]]:
    line = 1
    while block := stream.read(BLOCK):
        block += stream.readline()
        yield block, line, True
        line += block.count(b"\n")


def _txt_blocks(stream: BufferedIOBase) -> Iterator[tuple[bytes, int, bool]]:
    offset, held = 0, stream.read(BLOCK)
    while held:
        following = stream.read(BLOCK)
        cut = _last_cut(held) if following else len(held)
        if cut:
            yield held[:cut], offset, not following
        offset, held = offset + cut, held[cut:] + following


def _last_cut(block: bytes) -> int:
    for pattern in _CUTS:
        end = max((match.end() for match in pattern.finditer(block)), default=0)
        if end:
            return end
    # One endless word: cut before its last character, which may have bytes missing.
    end = len(block) - 1
    while end > 0 and block[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _parquet_blocks(path: Path, text_key: str) -> Iterator[Block]:
    parquet = _library("pyarrow.parquet", "pyarrow", path)
    done = 0
    try:
        table = parquet.ParquetFile(path)
        if text_key not in table.schema_arrow.names:
            columns = f"its columns: {', '.join(table.schema_arrow.names)}"
            raise TplaunchError(Problem(f"{path}: no column {text_key!r}", why=columns, fix=_KEY))
        size, rows = path.stat().st_size, max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            texts = batch.column(0).to_pylist()
            share = size * (done + len(texts)) // rows - size * done // rows
            yield Block(path, "parquet", texts, done, True, share)
            done += len(texts)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two
        raise TplaunchError(Problem("cannot read it as Parquet", why=str(error), where=f"{path}: row {done}")) from None


def _unpack(raw: BufferedIOBase, packed: str, path: Path) -> BufferedIOBase:
    if packed == ".gz":
        return gzip.open(raw)
    if packed == ".zst":
        return BufferedReader(_ZstdFrames(raw, _library("zstandard", "zstandard", path)), BLOCK)
    return raw


class _ZstdFrames(RawIOBase):
    """The bytes of all frames of a .zst; unlike the library's own reader it notices a file that was cut off."""

    def __init__(self, raw: BufferedIOBase, zstandard: Any) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(1 << 17)
            if not self._packed:
                if self._frame:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._packed)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _library(module: str, package: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TplaunchError(
            Problem(f"{path}: reading this format needs {package}", fix=f"pip install {package}, or tplaunch[formats]")
        ) from None


def _json_text(line: bytes, text_key: str, path: Path, number: int) -> str:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TplaunchError(Problem("not JSON", why=str(error), where=where)) from None
    if not isinstance(record, dict) or text_key not in record:
        fields = f"its fields: {', '.join(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        raise TplaunchError(Problem(f"no field {text_key!r}", why=fields, fix=_KEY, where=where))
    return _checked(record[text_key], where)


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise TplaunchError(Problem(f"the text must be a string, not {type(text).__name__}", where=where))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TplaunchError(
            Problem("the text holds half of a surrogate pair", why=f"at character {error.start}", where=where)
        ) from None
    return text
