"""Checksums of files that a launch has read before: thousands of corpora are not read again to know them again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tplaunch.files import write_atomic

_KEPT = 100_000  # files, the last ones
_SETTLED = 2.0  # seconds: a file may change again within the same tick of its times


class Remembered:
    """Sums by path, true for as long as a file's size, times and place on the disk are the same.

    The time of the last change of its entry (`st_ctime`) counts too: a program can set the other one back.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._new = file, False
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError):
            found = {}
        self._sums: dict[str, list[object]] = found if isinstance(found, dict) else {}

    def sum_of(self, path: Path, read: Callable[[Path], str]) -> str:
        """The sum that `read` gives of a file, from memory where it is there."""
        if (known := self.known(path, read.__name__)) is not None:
            return known
        status = path.stat()
        found = read(path)
        if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED:
            self._keep(_key(path, read.__name__), [*_state(status), found])
        return found

    def known(self, path: Path, read: str) -> str | None:
        """The sum that a function, by its name, gave of a file; None where it is not remembered."""
        try:
            now = _state(path.stat())
        except OSError:
            return None
        match self._sums.get(_key(path, read)):
            case [*state, str(known)] if state == now:
                return known
        return None

    def made(self, wanted: str) -> str | None:
        """What was made for those who wanted it by this name."""
        match self._sums.get(f"made {wanted}"):
            case [str(name)]:
                return name
        return None

    def note(self, wanted: str, name: str) -> None:
        """Remember what was made."""
        if self.made(wanted) != name:
            self._keep(f"made {wanted}", [name])

    def _keep(self, key: str, value: list[object]) -> None:
        self._sums.pop(key, None)
        self._sums[key], self._new = value, True

    def save(self) -> None:
        """Keep what is new; where that cannot be, the files are read again."""
        if not self._new:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file, json.dumps(dict([*self._sums.items()][-_KEPT:])))
        except OSError:
            pass


def _key(path: Path, read: str) -> str:
    return f"{read} {path.absolute()}"


def _state(status: os.stat_result) -> list[object]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@contextmanager
def remembered(cache: Path) -> Iterator[Remembered]:
    """The sums in a cache, kept at the end."""
    sums = Remembered(cache / "sums.json")
    try:
        yield sums
    finally:
        sums.save()
