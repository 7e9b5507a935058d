"""Raw text read in blocks of bounded size, also where one document is larger: plain or packed text, and tables."""

from __future__ import annotations

import codecs
import importlib
import json
import shlex
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from tplaunch.data.cuts import Cuts, byte_level
from tplaunch.data.endings import FORMAT
from tplaunch.data.inputs import shown
from tplaunch.data.longline import text_in_line, whole_characters
from tplaunch.data.unpack import DAMAGED, library, unpacked
from tplaunch.errors import Problem, TplaunchError

BLOCK = 1 << 20  # bytes of text that one thread takes in one go
_ROWS = 256  # of a table, at most, that are read in one go
_UNPACK = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc", ".zst": "zstd -dc"}  # a user's commands
KEY_HELP = "name the one that holds the text: data.text_key in a recipe, --text-key on the command line"


@dataclass(frozen=True)
class Block:
    """What one thread takes in one go: some lines of a .jsonl, some rows of a table, or a piece of one document.

    Attributes:
        path: the input, as messages call it.
        kind: "lines", "rows" or "piece".
        payload: whole lines as bytes, rows as they are, or text.
        first: number of the first line or row, for messages.
        ends: whether the document ends here (piece).
        read: bytes of the input file consumed since the block before, for progress.
        before: the character that stands before a piece in its document.
        bad: problems of documents that were left out before this block.
    """

    path: Path
    kind: str
    payload: bytes | str | list[Any]
    first: int = 0
    ends: bool = True
    read: int = 0
    before: str = ""
    bad: Sequence[Problem] = ()

    def texts(self, text_key: str, bad: list[Problem] | None = None) -> list[str]:
        """The texts of the block: one a document, or one piece of a document.

        Args:
            text_key: field or column that holds the text.
            bad: takes what is wrong with documents, which are then left out.

        Raises:
            TplaunchError: not JSON, or without the text; the place is named.
        """
        if isinstance(self.payload, str):
            return [self.payload]
        lines = isinstance(self.payload, bytes)
        found = []
        every = self.payload.split(b"\n") if isinstance(self.payload, bytes) else self.payload
        for number, one in enumerate(every, self.first):
            try:
                if not lines:
                    found.append(_checked(one, f"{self.path}: row {number}"))
                elif one.strip():
                    found.append(_json_text(one, text_key, f"{self.path}:{number}"))
            except TplaunchError as error:
                if bad is None:
                    raise
                bad.extend(error.problems)
        return found


def blocks(path: Path, text_key: str, cuts: Cuts | None = None, skip_bad: bool = False) -> Iterator[Block]:
    """Blocks of an input, in order; a function of the file's bytes and of where its texts may be cut.

    Args:
        path: the input.
        text_key: field or column that holds the text.
        cuts: of the tokenizer that gets the blocks; default: of those that `train_bpe` makes.
        skip_bad: leave out long documents that cannot be read; short ones are the reader's matter (`Block.texts`).

    Raises:
        TplaunchError: the format's library is missing, the packed file is damaged, or not UTF-8.
    """
    match = FORMAT.search(path.name)
    assert match is not None, "callers ask is_raw first"
    cuts = cuts or Cuts(byte_level())
    if match["table"]:
        yield from _parquet_blocks(path, text_key, cuts, skip_bad)
        return
    with path.open("rb") as raw:
        stream, name = unpacked(raw, match["packed"] or "", path), shown(path)
        before = 0
        try:
            if match["lines"] == "txt":
                found = _pieces(name, _decoded(iter(partial(stream.read, BLOCK), b""), str(name)), cuts)
            else:
                found = _line_blocks(name, stream, text_key, cuts, skip_bad)
            for block in found:
                yield replace(block, read=raw.tell() - before)
                before = raw.tell()
        except DAMAGED as error:
            raise TplaunchError(
                Problem(f"cannot read it to its end: {error}", where=f"{name}: byte {raw.tell()}")
            ) from None


def _pieces(path: Path, parts: Iterable[str], cuts: Cuts) -> Iterator[Block]:
    """The pieces of one document."""
    for before, piece, last in cuts.pieces(parts, BLOCK):
        yield Block(path, "piece", piece, ends=last, before=before)


def _decoded(parts: Iterable[bytes], place: str) -> Iterator[str]:
    """UTF-8 to text."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for part in chain(parts, (None,)):
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(part or b"", final=part is None)
        except UnicodeDecodeError as error:
            raise TplaunchError(
                Problem(
                    "not UTF-8",
                    where=f"{place}: byte {offset - held + error.start}",
                    fix="convert it, for example: iconv -f latin1 -t utf-8",
                )
            ) from None
        offset += len(part or b"")


def _as_lines(path: Path) -> str:
    """The command that makes JSON lines of a JSON array."""
    name, lines = shlex.quote(path.name), shlex.quote(f"{path.name.split('.')[0]}.lines.jsonl")
    unpack = _UNPACK.get(path.suffix)
    return f"{unpack} {name} | jq -c '.[]' > {lines}" if unpack else f"jq -c '.[]' {name} > {lines}"


def refuse_array(path: Path, begin: bytes) -> None:
    """Refuse, by its first bytes, a file that is one JSON array.

    Raises:
        TplaunchError: it is one.
    """
    if begin.lstrip()[:1] == b"[":
        what, why = f"{path} is one JSON array, not JSON lines", "each line must be an object of its own"
        raise TplaunchError(Problem(what, why=why, fix=_as_lines(path)))


def _line_blocks(path: Path, stream: BufferedIOBase, text_key: str, cuts: Cuts, skip_bad: bool) -> Iterator[Block]:
    """Whole lines by the block; of a line that is longer than a block, the pieces of its text."""
    number = 1
    while block := stream.read(BLOCK):
        if number == 1:
            refuse_array(path, block)
        block += stream.readline(BLOCK)
        start = block.rfind(b"\n") + 1
        if len(block) - start <= BLOCK:  # else its end is not read
            yield Block(path, "lines", block, number)
            number += block.count(b"\n")
            continue
        if start:
            yield Block(path, "lines", block[:start], number)
            number += block.count(b"\n")
        line = _rest_of_line(block[start:], stream)
        yield from _long_line(path, line, f"{path}:{number}", text_key, cuts, skip_bad)
        number += 1


def _rest_of_line(begin: bytes, stream: BufferedIOBase) -> Iterator[bytes]:
    part = begin
    while part:
        yield part
        if part.endswith(b"\n"):
            return
        part = stream.readline(BLOCK)


def _long_line(
    path: Path, line: Iterator[bytes], where: str, text_key: str, cuts: Cuts, skip_bad: bool
) -> Iterator[Block]:
    if not skip_bad:
        yield from _pieces(path, text_in_line(line, text_key, where, KEY_HELP), cuts)
        return
    # Whether it is good shows at its end: keep it meanwhile, on disk.
    with tempfile.TemporaryFile() as kept:
        for part in line:
            kept.write(part)
        for last in (False, True):
            kept.seek(0)
            texts = text_in_line(iter(partial(kept.read, BLOCK), b""), text_key, where, KEY_HELP)
            try:
                if last:
                    yield from _pieces(path, texts, cuts)
                else:
                    deque(texts, maxlen=0)
            except TplaunchError as error:
                yield Block(path, "rows", [], bad=error.problems)
                return


def _parquet_blocks(path: Path, text_key: str, cuts: Cuts, skip_bad: bool) -> Iterator[Block]:
    parquet = library("pyarrow.parquet", "pyarrow", path)
    done = 0
    try:
        # Read by parts: by default it holds all of a row group's column.
        table = parquet.ParquetFile(path, buffer_size=BLOCK)
        name, *fields = _column(table.schema_arrow, text_key, path)
        size, rows = path.stat().st_size, max(1, table.metadata.num_rows)
        read = 0
        for cells in _row_groups(path, table, name, fields):
            for block in _row_blocks(path, cells, done, cuts, skip_bad):
                done = block.first + (len(block.payload) if block.kind == "rows" else int(block.ends))
                share, read = size * done // rows - read, size * done // rows
                yield replace(block, read=share)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two
        raise TplaunchError(Problem("cannot read it as Parquet", why=str(error), where=f"{path}: row {done}")) from None


def _column(schema: Any, text_key: str, path: Path) -> list[str]:
    """The name of a column, and of the fields in it that lead to the text."""
    if text_key in schema.names:
        return [text_key]
    names = text_key.split(".")
    kind = schema.field(names[0]).type if names[0] in schema.names else None
    for name in names[1:]:
        fields = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)} if kind is not None else {}
        kind = fields.get(name)
    if kind is None:
        raise TplaunchError(
            Problem(f"{path}: no column {text_key!r}", why=f"its columns: {', '.join(schema.names)}", fix=KEY_HELP)
        )
    return names


def _row_groups(path: Path, table: Any, name: str, fields: list[str]) -> Iterator[Iterator[_Cell]]:
    """The cells of a column, some rows at a time."""
    from tplaunch.data.pages import large_values  # imports pyarrow

    whole = ".".join([name, *fields])
    described = [table.schema.column(number) for number in range(len(table.schema))]
    number = next((number for number, column in enumerate(described) if column.path == whole), None)
    for group in range(table.num_row_groups):
        with path.open("rb") as file:
            chunk = table.metadata.row_group(group).column(number) if number is not None else None
            stored = large_values(file, chunk, described[number]) if number is not None else None
            if stored is not None:
                yield (_stored_cell(one) for one in stored)
                continue
        rows = _rows_at_once(table.metadata.row_group(group))
        for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[whole]):
            column = batch.column(0)
            for field in fields:
                column = importlib.import_module("pyarrow.compute").struct_field(column, field)
            yield map(_arrow_cell, column)


@dataclass(frozen=True)
class _Cell:
    """A value of a table.

    Attributes:
        size: in bytes; 0 where it has none.
        value: all of it.
        parts: its bytes in order.
    """

    size: int
    value: Callable[[], Any]
    parts: Callable[[], Iterator[bytes]]


def _stored_cell(stored: Any) -> _Cell:
    if stored is None:
        return _Cell(0, lambda: None, lambda: iter(()))
    return _Cell(stored.size, lambda: b"".join(stored.parts()), stored.parts)


def _arrow_cell(cell: Any) -> _Cell:
    buffer: Any = cell.as_buffer() if hasattr(cell, "as_buffer") else None
    size = buffer.size if buffer else 0
    places = [(start, min(BLOCK, size - start)) for start in range(0, size, BLOCK)] if size > BLOCK else []
    return _Cell(size, cell.as_py, lambda: (buffer.slice(*place).to_pybytes() for place in places))


def _rows_at_once(group: Any) -> int:
    """Rows that take about a block, as far as the table says how large they are."""
    return int(min(_ROWS, max(1, BLOCK * group.num_rows // max(1, group.total_byte_size))))


def _row_blocks(path: Path, column: Iterable[_Cell], first: int, cuts: Cuts, skip_bad: bool) -> Iterator[Block]:
    """Rows together up to a block; of a longer one, its pieces."""
    rows: list[Any] = []
    held, number = 0, first - 1
    for number, cell in enumerate(column, first):
        if held + cell.size > BLOCK and rows:
            yield Block(path, "rows", rows, number - len(rows))
            rows, held = [], 0
        if cell.size <= BLOCK:
            rows.append(cell.value())
            held += cell.size
            if len(rows) >= _ROWS:
                yield Block(path, "rows", rows, number + 1 - len(rows))
                rows, held = [], 0
            continue
        where = f"{path}: row {number}"
        try:
            if skip_bad:
                deque(_decoded(cell.parts(), where), maxlen=0)
        except TplaunchError as error:
            yield Block(path, "rows", [], number + 1, bad=error.problems)
            continue
        for piece in _pieces(path, _decoded(cell.parts(), where), cuts):
            yield replace(piece, first=number)
    if rows:
        yield Block(path, "rows", rows, number + 1 - len(rows))


def _json_text(line: bytes, text_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TplaunchError(Problem("not JSON", why=str(error), where=where)) from None
    if isinstance(record, dict) and text_key in record:
        return _checked(record[text_key], where)
    value = record
    for name in text_key.split("."):
        if not isinstance(value, dict) or name not in value:
            fields = (
                f"its fields: {', '.join(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
            )
            raise TplaunchError(Problem(f"no field {text_key!r}", why=fields, fix=KEY_HELP, where=where))
        value = value[name]
    return _checked(value, where)


def _checked(text: Any, where: str) -> str:
    if isinstance(text, bytes):
        return "".join(_decoded([text], where))
    if not isinstance(text, str):
        raise TplaunchError(Problem(f"the text must be a string, not {type(text).__name__}", where=where))
    return whole_characters(text, where)
