"""Columns of a Parquet file whose pages are too large for memory: unpacked to disk by parts, read value by value.

pyarrow has a page in memory packed, unpacked and as values, at once. This reads what common writers write of text
(pages of versions 1 and 2, plain or by dictionary, each of pyarrow's codecs that can be unpacked by parts); the rest is
pyarrow's to read. Source: the format's own description, https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow

PART = 1 << 20  # bytes that are unpacked or handed on in one go
LARGE = 8 << 20  # bytes of an unpacked page from which it is not pyarrow's to read
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_PLAIN, _BY_DICTIONARY, _RLE = 0, (2, 8), 3  # encodings
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli", "UNCOMPRESSED": None}
_TEXT = ("STRING", "NONE")  # logical types whose bytes are the value


class Stored(NamedTuple):
    """A value that lies in a file.

    Args:
        file: that holds it, as long as its column is read.
        start, size: its bytes.
    """

    file: IO[bytes]
    start: int
    size: int

    def parts(self) -> Iterator[bytes]:
        """Its bytes, in order."""
        for begin in range(0, self.size, PART):
            self.file.seek(self.start + begin)
            yield self.file.read(min(PART, self.size - begin))


@dataclass(frozen=True)
class _Page:
    """A page, where it lies in the file.

    Attributes:
        kind: of the page.
        start, packed, size: its bytes in the file; its size when it is unpacked.
        about: its header's part on this kind, field by field.
    """

    kind: int
    start: int
    packed: int
    size: int
    about: dict[int, Any]

    @property
    def encoding(self) -> int:
        return int(self.about.get(4 if self.kind == _DATA_2 else 2, -1))

    def is_known(self) -> bool:
        if self.kind == _DATA:
            return self.encoding in (_PLAIN, *_BY_DICTIONARY) and self.about.get(3) == _RLE
        if self.kind == _DATA_2:
            return self.encoding in (_PLAIN, *_BY_DICTIONARY)
        return self.kind == _DICTIONARY and self.encoding in (_PLAIN, 2)


def large_values(file: IO[bytes], chunk: Any, column: Any) -> Iterator[Stored | None] | None:
    """The values of a column in a row group, where a page of it is large; None where pyarrow should read it.

    Args:
        file: the Parquet file.
        chunk: pyarrow's metadata of the column in the row group.
        column: pyarrow's description of the column.

    Raises:
        ValueError, OSError: the file is damaged.
    """
    if column.physical_type != "BYTE_ARRAY" or column.logical_type.type not in _TEXT or column.max_repetition_level:
        return None
    if chunk.compression not in _CODECS or chunk.total_uncompressed_size < LARGE:
        return None
    start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    pages = list(_pages(file, start, chunk.total_compressed_size))
    if all(page.size < LARGE for page in pages) or not all(page.is_known() for page in pages):
        return None
    return _values(file, pages, _CODECS[chunk.compression], column.max_definition_level)


def _pages(file: IO[bytes], start: int, size: int) -> Iterator[_Page]:
    at = start
    while at < start + size:
        file.seek(at)
        header = _fields(file)
        kind, at = header[1], file.tell()
        yield _Page(kind, at, header[3], header[2], header.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, 6), {}))
        at += header[3]


def _values(file: IO[bytes], pages: list[_Page], codec: str | None, levels: int) -> Iterator[Stored | None]:
    """The values in order; None where there is none."""
    with tempfile.TemporaryFile() as entries_file, tempfile.TemporaryFile() as page_file:
        entries: list[Stored] = []
        for page in pages:
            unpacked = entries_file if page.kind == _DICTIONARY else page_file
            unpacked.seek(0)
            unpacked.truncate()
            defined = _unpack(file, page, codec, levels, unpacked)
            if page.kind == _DICTIONARY:
                entries = list(_plain(unpacked, page.about[1]))
                continue
            count = int(defined.sum()) if defined is not None else page.about[1]
            if page.encoding == _PLAIN:
                found = _plain(unpacked, count)
            else:
                (width,) = unpacked.read(1) or b"\0"
                numbers = _numbers(unpacked.read(), width, count)
                found = (entries[number] for number in numbers)
            present = repeat(True, count) if defined is None else defined
            yield from (next(found) if is_there else None for is_there in present)


def _unpack(file: IO[bytes], page: _Page, codec: str | None, levels: int, to: IO[bytes]) -> np.ndarray | None:
    """Unpack a page and stand before its values.

    Returns:
        Which rows have a value; None: all.
    """
    front, packed = b"", codec
    if page.kind == _DATA_2:
        length = page.about[5]
        file.seek(page.start)
        front, packed = file.read(length), codec if page.about.get(7, True) else None
        _copy_unpacked(file, page.start + length, page.packed - length, page.size - length, packed, to)
        to.seek(0)
    else:
        _copy_unpacked(file, page.start, page.packed, page.size, packed, to)
        to.seek(0)
        if page.kind == _DATA and levels:
            front = to.read(int.from_bytes(to.read(4), "little"))
    if page.kind == _DICTIONARY or not levels:
        return None
    return _numbers(front, levels.bit_length(), page.about[1]) == levels


def _copy_unpacked(file: IO[bytes], start: int, packed: int, size: int, codec: str | None, to: IO[bytes]) -> None:
    if codec == "snappy":
        try:
            for part in _snappy_parts(Stored(file, start, packed).parts()):
                to.write(part)
        except OSError:  # its writer's fragments refer to each other
            to.seek(0)
            to.truncate()
            file.seek(start)
            to.write(pyarrow.Codec(codec).decompress(file.read(packed), size, asbytes=True))
    elif codec is None or not size:
        for part in Stored(file, start, packed).parts():
            to.write(part)
    else:
        with pyarrow.OSFile(file.name) as whole, whole.get_stream(start, packed) as source:
            stream = pyarrow.CompressedInputStream(source, codec)
            for part in iter(partial(stream.read, PART), b""):
                to.write(part)
    if to.tell() != size:
        raise ValueError(f"a page at byte {start} holds {to.tell():,} bytes instead of {size:,}")


def _plain(file: IO[bytes], count: int) -> Iterator[Stored]:
    """Values that each stand behind their length."""
    at = file.tell()
    for _ in range(count):
        file.seek(at)
        size = int.from_bytes(file.read(4), "little")
        yield Stored(file, at + 4, size)
        at += 4 + size


def _numbers(content: bytes, width: int, count: int) -> np.ndarray:
    """Small numbers in runs of one value or of packed bits."""
    parts, at, held = [np.zeros(0, np.int64)], 0, 0
    while held < count:
        head, at = _varint_in(content, at)
        if head & 1:
            size = (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(content, np.uint8, size, at), bitorder="little")
            run = bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width)) if width else np.zeros(count, int)
        else:
            size = (width + 7) // 8
            run = np.full(min(head >> 1, count), int.from_bytes(content[at : at + size], "little"))
        at += size
        parts.append(run)
        held += len(run)
        if not len(run):
            raise ValueError("an empty run")
    return np.concatenate(parts)[:count]


_FRAGMENT = 1 << 16  # bytes that every known writer of Snappy packs for themselves
# What an element of Snappy takes, and what it makes, by its first byte; 0 where the length of a literal follows.
_TAKES = [(1 + (tag >> 2) + 1 if tag >> 2 < 60 else 0) if tag & 3 == 0 else (0, 2, 3, 5)[tag & 3] for tag in range(256)]
_MAKES = [4 + (tag >> 2 & 7) if tag & 3 == 1 else (tag >> 2) + 1 for tag in range(256)]


def _snappy_parts(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack Snappy fragment by fragment: the library would have it all in memory.

    Raises:
        OSError: a part refers to bytes before it.
        ValueError: the stream is damaged.
    """
    codec, held, at = pyarrow.Codec("snappy"), next(parts, b""), 0
    total, at = _varint_in(held, at)
    while total:
        held, at, made = held[at:], 0, 0
        limit = min(PART, total)
        while made != limit:
            if made > limit:  # no whole number of fragments: take more
                limit = min(made + -made % _FRAGMENT, total)
            if at + 2 * _FRAGMENT > len(held) and (more := next(parts, b"")):
                held += more
                continue
            until = min(limit, made + _FRAGMENT)
            try:
                while made < until:
                    tag = held[at]
                    if takes := _TAKES[tag]:
                        at += takes
                        made += _MAKES[tag]
                    else:
                        follow = (tag >> 2) - 59
                        length = int.from_bytes(held[at + 1 : at + 1 + follow], "little") + 1
                        at += 1 + follow + length
                        made += length
            except IndexError:
                raise ValueError("a page ends inside its Snappy stream") from None
            if made > total:
                raise ValueError("a page's Snappy stream is longer than it says")
        total -= made
        yield codec.decompress(_varint(made) + held[:at], made, asbytes=True)


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])


def _varint_in(content: bytes, at: int) -> tuple[int, int]:
    """A number and the place behind it."""
    number = shift = 0
    while at < len(content):
        number |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 128:
            return number, at
    raise ValueError("a number does not end")


def _fields(file: IO[bytes]) -> dict[int, Any]:
    """A struct of Thrift's compact protocol: field number -> value; of strings only that they are there.

    Raises:
        ValueError: it is none that a page's header can be.
    """
    found: dict[int, Any] = {}
    number = 0
    while head := _byte(file):
        kind, step = head & 15, head >> 4
        number = number + step if step else _signed(file)
        if kind in (1, 2):
            found[number] = kind == 1
        elif kind in (4, 5, 6):
            found[number] = _signed(file)
        elif kind == 8:
            file.seek(_unsigned(file), 1)
        elif kind == 12:
            found[number] = _fields(file)
        else:
            raise ValueError(f"a page's header with a field of kind {kind}")
    return found


def _byte(file: IO[bytes]) -> int:
    read = file.read(1)
    if not read:
        raise ValueError("the file ends inside a page's header")
    return read[0]


def _unsigned(file: IO[bytes]) -> int:
    number = shift = 0
    while True:
        byte = _byte(file)
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


def _signed(file: IO[bytes]) -> int:
    number = _unsigned(file)
    return number >> 1 ^ -(number & 1)
