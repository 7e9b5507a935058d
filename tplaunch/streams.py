"""Standard output and standard error as they are: of any encoding, and with readers that may go away."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_PLAIN = "tplaunch-plain"  # the error handler, and ASCII under another name
_LIKE = {  # signs by what is written for them
    "#": "█▉▊▋▌▐▆▇▓■",
    "+": "▄▅▒",
    ".": "▂▃░·",
    "_": "▁",
    "|": "▍▎▏",
    "*": "•●",
    "o": "○",
    "...": "…",
    "->": "→",
    "<-": "←",
    "<->": "↔",
    "=>": "⇒",
    "<=": "⇐≤",
    ">=": "≥",
    "!=": "≠",
    "==": "≡",
    "~": "≈",
    "^": "↑▲",
    "v": "↓▼✓✔",
    ">": "▶►",
    "<": "◀◄",
    "x": "✗✘\u00d7",
    "+/-": "±",
    "/": "÷\u2044",
    "inf": "∞",
    "u": "µμ",
    "EUR": "€",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212",
    "'": "\u2018\u2019\u201a\u2032",
    '"': "\u201c\u201d\u201e\u2033«»▀",
}
_FALLBACKS = {sign: plain for plain, signs in _LIKE.items() for sign in signs}


def adapt_encoding() -> None:
    """Let standard output and error take any text: what their encoding lacks is written in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not codecs.lookup(stream.encoding).name.startswith("utf"):
            codecs.register_error(_PLAIN, _in_ascii)
            codecs.register(_find_plain)
            # click takes a stream in "ascii" for a mistake, and writes UTF-8 to it: under another name it does not.
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=_PLAIN if is_ascii else None, errors=_PLAIN)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler: signs that draw by one that is like it, letters without their accents, else "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_nearest, text)), error.end


def _nearest(char: str) -> str:
    if "\u2500" <= char <= "\u257f":  # the lines of boxes and bars
        return "-" if char in "─━╴╶╸╺" else "|" if char in "│┃╎╏" else "+"
    if "\u2800" <= char <= "\u28ff":  # a spinner of dots
        return "*"
    if char in _FALLBACKS:
        return _FALLBACKS[char]
    parts = unicodedata.normalize("NFKD", char)
    return "".join(_FALLBACKS.get(part, part) for part in parts).encode("ascii", "ignore").decode() or "?"


def _find_plain(name: str) -> codecs.CodecInfo | None:
    if name.replace("_", "-") != _PLAIN:
        return None
    ascii_ = codecs.lookup("ascii")
    return codecs.CodecInfo(
        name=_PLAIN,
        encode=ascii_.encode,
        decode=ascii_.decode,
        incrementalencoder=ascii_.incrementalencoder,
        incrementaldecoder=ascii_.incrementaldecoder,
    )


class LostText:
    """Where the text of streams goes that nobody takes any more: into a log, once it is known."""

    def __init__(self) -> None:
        self.log: Path | None = None
        self._waiting = ""

    def keep_in(self, log: Path) -> None:
        """Write what is lost, up to now and from now on, to this file; its directory exists."""
        self.log = log
        self.write("")

    def write(self, text: str) -> None:
        """Keep a text."""
        self._waiting += text
        if self.log is not None and self._waiting:
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(self._waiting)
            except OSError:
                pass  # nor can the run directory be written; what trains there will say so
            self._waiting = ""


class _Steady:
    """A text stream whose writes never fail: from the first that does, text goes to where lost text goes.

    Else as the stream that it stands for.
    """

    def __init__(self, stream: TextIO, name: str, lost: LostText) -> None:
        self._stream, self._name, self._lost = stream, name, lost
        self._unsure = ""  # written since the last flush: it may be in a buffer still
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._gone:
            self._lost.write(text)
            return len(text)
        try:
            self._stream.write(text)
        except OSError as error:
            self._unsure += text
            self._give_up(error)
        else:
            self._unsure += text
            if getattr(self._stream, "line_buffering", False) and text.endswith("\n"):
                self._unsure = ""
        return len(text)

    def flush(self) -> None:
        if self._gone:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)
        self._unsure = ""

    def _give_up(self, error: OSError) -> None:
        self._gone = True
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lost.write(f"{when} {self._name} is lost ({error.strerror}); the run goes on, and what follows is here\n")
        self._lost.write(self._unsure)
        try:  # what the buffer holds would fail again when the process ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass


@contextmanager
def steady_streams() -> Iterator[LostText]:
    """Within the block, no write to standard output or error fails, whoever has stopped reading them.

    Yields:
        What takes the text from then on: `keep_in` names its file.
    """
    lost, before = LostText(), (sys.stdout, sys.stderr)
    steady: Any = [_Steady(stream, name, lost) for stream, name in zip(before, ("stdout", "stderr"), strict=True)]
    sys.stdout, sys.stderr = steady
    try:
        yield lost
        for stream in steady:
            stream.flush()
    finally:
        sys.stdout, sys.stderr = before
