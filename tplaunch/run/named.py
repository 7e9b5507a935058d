"""What commands and recipes call a run, or a step of it: `RUN`, or `RUN@STEP`. What is there is not looked at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

RUNS = Path("runs")


class Named(NamedTuple):
    """A run, a checkpoint, or another folder that is named.

    Args:
        path: of the folder.
        step: of a checkpoint of the run; None: its newest.
    """

    path: Path
    step: int | None = None


def read_name(text: str | Path) -> Named:
    """Read `RUN@STEP`, or a path. RUN is a directory, or a name under runs/; a folder whose own name ends like that is
    itself meant."""
    path, step = Path(text), None
    if not path.exists():
        run, _, number = str(text).rpartition("@")
        if run and number.isdecimal():
            path, step = Path(run), int(number)
    if not path.exists():
        # A recipe's paths are absolute by now, from where it lies.
        below = path.parent / RUNS / path.name if path.is_absolute() else RUNS / path
        path = below if below.is_dir() else path
    return Named(path, step)
