"""Files that must survive a crash: durable atomic writes, JSON lines, locks, tails and checksums; and files from
elsewhere, which may be meant to harm."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]


class Unsafe(ValueError):
    """A file from elsewhere asks for what no such file needs: to run code, or to read outside its folder."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file's content, whole or not at all, durably: a crash leaves the old file or the new one.

    The temporary file lies beside it and carries this process's id, so that two processes never share one.

    Raises:
        OSError: it cannot be written; the file is then as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Make a directory's entries outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_line(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON (`as_json`)."""
    return json.dumps(as_json(record), allow_nan=False).encode() + b"\n"


def as_json(record: Mapping[str, Any]) -> Record:
    """The record with null for numbers that are not finite: JSON has none."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record by one `write` on an O_APPEND file, so that several processes may append at once."""
    append_lines(path, [record])


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records, all by one `write`; see `append_line`."""
    line = b"".join(map(to_line, records))
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = os.fstat(descriptor).st_size
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            # A crash tore the last line: it keeps a line to itself. (Or another process is writing right
            # now; then this makes an empty line, which readers skip.)
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def parse_lines(data: bytes) -> list[Record]:
    """Parse JSON lines. Empty lines, and lines that a crash has torn, are skipped."""
    records = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_lines(path: Path) -> list[Record]:
    """Read a file of JSON lines; a missing file has none."""
    return parse_lines(path.read_bytes()) if path.exists() else []


class Tail:
    """Reads what has been appended to a file since the last call. A file that was replaced is read from its start.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = 0
        self._offset = 0

    def read(self, *, whole_lines: bool = False) -> bytes:
        """Return the new bytes.

        Args:
            whole_lines: leave a line that is still being written for the next call.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return b""
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            data = file.read()
        if whole_lines:
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return data


@contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on a file, which exists only meanwhile. The kernel frees it when its holder ends.

    Args:
        path: the lock file.
        waiting: called once when another process holds the lock.
    """
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before may have removed the file that we opened; then the lock guards nothing.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inside(folder: Path, name: Any, *, also: Path | None = None) -> Path:
    """The file that a name means in a folder; name and folder come from elsewhere.

    Args:
        also: links may lead here, too.

    Raises:
        Unsafe: the name is absolute, or leaves the folder by `..` or through a link.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise Unsafe(f"names {str(name)[:100]!r}, which is no file")
    path = folder / name
    try:
        roots = [root.resolve() for root in (folder, also) if root is not None]
        leaves = ".." in Path(name).parts or not any(path.resolve().is_relative_to(root) for root in roots)
    except (OSError, RuntimeError):  # a ring of links
        leaves = True
    if leaves or Path(name).is_absolute():
        raise Unsafe(f"names {name[:100]!r}, which is outside of {folder}")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a file from elsewhere for reading; never wait for one that is a pipe.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(descriptor, "rb")
