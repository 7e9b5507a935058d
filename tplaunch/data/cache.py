"""The cache directory: what is in it is made once, and is safe to delete at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import locked

if TYPE_CHECKING:
    from tplaunch.data.progress import Progress


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


@contextmanager
def owned(prefix: Path, show: Progress) -> Iterator[None]:
    """Be the only process that writes at this prefix; waits for another one.

    Raises:
        TplaunchError: also for what goes wrong with the disk inside.
    """
    lock = prefix.with_name(prefix.name + ".lock")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, lambda: show.say(f"waiting for another process that prepares {prefix}")):
            yield
    except OSError as error:
        raise TplaunchError(
            Problem(f"cannot prepare {prefix}", why=str(error), fix="mend that and run again; it goes on from there")
        ) from None
