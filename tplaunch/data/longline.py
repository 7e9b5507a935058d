"""The text in a line of JSON that is too long to hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tplaunch.errors import Problem, TplaunchError

_PART = 1 << 16  # bytes of a string that are decoded in one go
_HEX = rb"[0-9a-fA-F]"
# The inside of a string, in units that a cut must not divide: plain bytes, an escape, both halves of a pair.
_UNITS = re.compile(
    rb'(?:[^"\\]+'
    rb'|\\["\\/bfnrt]'
    rb"|\\u(?![dD][89abAB])" + _HEX + rb"{4}"
    rb"|\\u[dD][89abAB]" + _HEX + rb"{2}(?:\\u" + _HEX + rb"{4}|(?=[^\\])|(?=\\[^u])))*"
)
_LONGEST = 12  # bytes of a unit that is an escape
_SPACE = re.compile(rb"[ \t\r\n]*")
_LITERAL = re.compile(rb"[^\s,\]}:\[{\"]*")
_NAMES = {b"t": "bool", b"f": "bool", b"n": "NoneType", b"{": "dict", b"[": "list"}


def text_in_line(parts: Iterator[bytes], text_key: str, where: str, key_help: str) -> Iterator[str]:
    """The text of one JSON object, in parts; all of the line is checked by the end.

    Args:
        parts: of the line.
        text_key: the field, or fields in each other with dots between.
        where: the place, for messages.
        key_help: what to do where there is no such field.

    Raises:
        TplaunchError: not JSON, or without the text.
    """
    line = _Line(parts)
    names: list[str | None] = []  # the fields that lead to here; None in an array
    fields: list[str] = []
    found = False
    try:
        kind = line.peek()
        while True:
            begin = line.peek()
            wanted = bool(names) and None not in names and ".".join(map(str, names)) == text_key
            if wanted and (found or begin != b'"'):
                what = "the text is said twice" if found else f"the text must be a string, not {_name(begin)}"
                raise TplaunchError(Problem(what, where=where))
            if begin in (b"{", b"["):
                line.take(begin)
                if line.peek() == (b"}" if begin == b"{" else b"]"):
                    line.take(line.peek())
                else:
                    names.append(line.name() if begin == b"{" else None)
                    fields += [str(names[0])] if len(names) == 1 else []
                    continue
            elif begin == b'"':
                for text in line.string():
                    if wanted:
                        yield whole_characters(text, where)
                found = found or wanted
            else:
                json.loads(line.literal())
            while names and line.peek() != b",":
                line.take(b"]" if names.pop() is None else b"}")
            if not names:
                break
            line.take(b",")
            names.append(line.name() if names.pop() is not None else None)
            fields += [str(names[0])] if len(names) == 1 else []
        if line.peek():
            raise ValueError("more follows the object")
    except ValueError as error:
        raise TplaunchError(Problem("not JSON", why=str(error), where=where)) from None
    if not found:
        why = f"its fields: {', '.join(fields)}" if kind == b"{" else f"it is a {_name(kind)}"
        raise TplaunchError(Problem(f"no field {text_key!r}", why=why, fix=key_help, where=where))


def whole_characters(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        TplaunchError: it holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TplaunchError(
            Problem("the text holds half of a surrogate pair", why=f"at character {error.start}", where=where)
        ) from None
    return text


def _name(begin: bytes) -> str:
    return _NAMES.get(begin, "str" if begin == b'"' else "number")


class _Line:
    """The parts of a line, read from left to right.

    Raises:
        ValueError: what is asked for is not there.
    """

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._held, self._at = parts, b"", 0

    def _more(self) -> bool:
        part = next(self._parts, b"")
        self._held, self._at = self._held[self._at :] + part, 0
        return bool(part)

    def peek(self) -> bytes:
        """The next byte that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._held, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._held):
                return self._held[self._at : self._at + 1]
            if not self._more():
                return b""

    def take(self, wanted: bytes) -> None:
        if self.peek() != wanted or not wanted:
            raise ValueError(f"expected {wanted.decode()!r}, found {self.peek().decode('latin-1')!r}")
        self._at += 1

    def name(self) -> str:
        """A field's name and the colon."""
        name = "".join(self.string())
        self.take(b":")
        return name

    def literal(self) -> bytes:
        while True:
            match = _LITERAL.match(self._held, self._at)
            assert match is not None
            if match.end() < len(self._held) or not self._more():
                self._at += len(match[0])
                return match[0]

    def string(self) -> Iterator[str]:
        """The parts of a string."""
        self.take(b'"')
        while True:
            match = _UNITS.match(self._held, self._at, self._at + _PART)
            assert match is not None
            end = match.end()
            closed = self._held[end : end + 1] == b'"'
            if not closed:
                end = self._whole(end)
            part = self._held[self._at : end]
            if part:
                yield json.loads('"' + part.decode("utf-8", "surrogatepass") + '"')
            self._at = end
            if closed:
                self._at += 1
                return
            if not part:
                if len(self._held) - self._at > _LONGEST:
                    raise ValueError("a bad escape in a string")
                if not self._more():
                    raise ValueError("a string does not end")

    def _whole(self, end: int) -> int:
        """`end`, moved to before a character whose bytes may go on."""
        while end > self._at and self._held[end - 1] >= 0x80:
            end -= 1
            if self._held[end] >= 0xC0:
                break
        return end
