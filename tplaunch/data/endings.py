"""Which files are raw text, by how their names end: all that checking a recipe needs to know of them."""

from __future__ import annotations

import glob
import re
from pathlib import Path

FORMAT = re.compile(r"\.(?:(?P<lines>txt|jsonl?)(?P<packed>\.gz|\.zst|\.bz2|\.xz)?|(?P<table>parquet))$")
KINDS = ".txt, .jsonl, .json (each also as .gz, .zst, .bz2 or .xz) or .parquet"
# Files that lie beside corpora and tokenizers, and are no text.
_ABOUT = re.compile(r"(^|\.)(meta|tokenizer|tokenizer_config|generation_config|special_tokens_map)\.json$")


def is_raw(path: Path) -> bool:
    """Whether a path names raw text: a file, by its ending, or a folder or pattern; otherwise it is a prefix of
    .bin/.idx."""
    if FORMAT.search(path.name):
        return True
    return not path.with_name(path.name + ".idx").exists() and (path.is_dir() or glob.has_magic(str(path)))


def files_of(path: Path) -> list[Path]:
    """The files of raw text that a path names: those in a folder and below, those that fit a pattern, in the order of
    their names; any other path is its own."""
    if path.is_dir():
        found = [one for one in path.rglob("*") if not any(p.startswith(".") for p in one.relative_to(path).parts)]
    elif glob.has_magic(str(path)) and not path.exists():
        found = [Path(one) for one in glob.iglob(str(path), recursive=True)]
    else:
        return [path]
    return sorted(one for one in found if FORMAT.search(one.name) and not _ABOUT.search(one.name) and one.is_file())
