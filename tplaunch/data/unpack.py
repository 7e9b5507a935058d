"""The bytes of packed files, by how their names end."""

from __future__ import annotations

import importlib
import lzma
import zlib
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from tplaunch.errors import Problem, TplaunchError

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading such bytes raises
_MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # of the standard library
_READ = 1 << 20


def unpacked(raw: BufferedIOBase, packed: str, path: Path) -> BufferedIOBase:
    """The bytes that a file holds.

    Args:
        raw: the file.
        packed: .gz, .bz2, .xz, .zst, or nothing.
        path: for messages.

    Raises:
        TplaunchError: the format's library is missing.
    """
    if packed in _MODULES:
        opened: BufferedIOBase = importlib.import_module(_MODULES[packed]).open(raw)
        return opened
    if packed == ".zst":
        return BufferedReader(_ZstdFrames(raw, library("zstandard", "zstandard", path)), _READ)
    return raw


def library(module: str, package: str, path: Path) -> Any:
    """A module that reads a format.

    Raises:
        TplaunchError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TplaunchError(
            Problem(f"{path}: reading this format needs {package}", fix=f"pip install {package}, or tplaunch[formats]")
        ) from None


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
