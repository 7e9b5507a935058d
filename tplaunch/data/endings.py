"""Which files are raw text, by how their names end: all that checking a recipe needs to know of them."""

from __future__ import annotations

import re
from pathlib import Path

FORMAT = re.compile(r"\.(?:(?P<lines>txt|jsonl)(?P<packed>\.gz|\.zst)?|(?P<table>parquet))$")


def is_raw(path: Path) -> bool:
    """Whether a path names raw text, by its ending; otherwise it is a prefix of .bin/.idx."""
    return FORMAT.search(path.name) is not None
