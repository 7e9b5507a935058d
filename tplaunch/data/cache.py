"""The cache directory: what is in it is made once, and is safe to delete at any time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import write_atomic


def default_cache() -> Path:
    """`$TPLAUNCH_CACHE`, or `~/.cache/tplaunch`."""
    named = os.environ.get("TPLAUNCH_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "tplaunch"


def subdirectory(cache: Path, name: str) -> Path:
    """A directory in the cache, made where needed.

    Raises:
        TplaunchError: it cannot be made.
    """
    path = cache / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TplaunchError(
            Problem(
                f"cannot make the cache directory {path}: {error.strerror}",
                fix="set TPLAUNCH_CACHE to a directory that can be written",
            )
        ) from None
    return path


def remembered(cache: Path, name: str, files: Sequence[Path], compute: Callable[[], Any]) -> Any:
    """The JSON value of `compute()`, a function of the contents of `files`; computed again when they change.

    A file counts as changed when its size, inode, or time of change differs, as in make.
    """
    key = hashlib.sha256("\0".join([name, *map(str, files)]).encode()).hexdigest()[:32]
    record = subdirectory(cache, "remembered") / f"{key}.json"
    stats = [path.stat() for path in files]
    identity = [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]
    if record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return known["value"]
    value = compute()
    write_atomic(record, json.dumps({"identity": identity, "value": value}))
    return value
