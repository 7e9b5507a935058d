"""The cache directory: what is in it is made once, and is safe to delete at any time."""

from __future__ import annotations

import os
from pathlib import Path

from tplaunch.errors import Problem, TplaunchError


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
