"""The files of raw text that somebody means: folders, patterns, lists and standard input made into names."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tplaunch.data.endings import FORMAT, KINDS, files_of
from tplaunch.data.progress import Progress
from tplaunch.data.unpack import DAMAGED, unpacked
from tplaunch.errors import Problem, TplaunchError

STDIN = Path("-")
_FOLDER = ".stdin."  # in the name of the folder that holds what came from there
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def raw_files(inputs: Sequence[Path], show: Progress | None = None) -> list[Path]:
    """The files of inputs, in the order of these and, of a folder or pattern, of their names; says so.

    Raises:
        TplaunchError: inputs are missing, empty or of an unknown kind; all are named.
    """
    files, problems = [], []
    for path in inputs:
        found = files_of(path)
        if not found:
            problems.append(Problem(f"{path}: no text in it", fix=f"use {KINDS}"))
        elif found != [path] and show:
            names = f", from {found[0].name} to {found[-1].name}" if len(found) > 1 else f": {found[0].name}"
            show.say(f"{path}: {len(found):,} files in the order of their names{names}")
        files += found
    for path in files:
        if not FORMAT.search(path.name):
            problems.append(Problem(f"{path}: unknown kind of text", fix=f"use {KINDS}"))
        elif not path.is_file():
            problems.append(Problem(f"{path}: no such file"))
        elif not os.access(path, os.R_OK):
            problems.append(Problem(f"{path}: no permission to read it"))
    if problems:
        raise TplaunchError(*problems)
    return files


def files_from(path: Path) -> list[Path]:
    """The names in a file, one a line; relative ones are from here, as in a shell.

    Raises:
        TplaunchError: it cannot be read, or is empty.
    """
    try:
        names = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TplaunchError(Problem(f"{path}: cannot read the list of files", why=str(error))) from None
    if not names:
        raise TplaunchError(Problem(f"{path}: the list of files is empty", fix="write one name a line"))
    return [Path(name) for name in names]


@contextmanager
def stdin_as_file(inputs: Sequence[Path], output: Path, stream: BinaryIO) -> Iterator[list[Path]]:
    """The inputs with `-` replaced by a file that holds what a stream gives: it is read more than once.

    It is JSON lines if it, unpacked, begins with a brace, else one text. The file lies beside the output meanwhile;
    messages call it `-` (`shown`).

    Raises:
        TplaunchError: `-` stands there twice, or the disk fails.
    """
    if STDIN not in inputs:
        yield list(inputs)
        return
    if list(inputs).count(STDIN) > 1:
        raise TplaunchError(Problem("standard input (-) can be read only once"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f"{output.name}{_FOLDER}", dir=output.parent)
    except OSError as error:
        raise TplaunchError(Problem(f"cannot keep standard input beside {output}", why=str(error))) from None
    with folder as name:
        kept = Path(name) / "stdin"
        try:
            with kept.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            kept = kept.rename(kept.with_name(kept.name + _ending(kept)))
        except OSError as error:
            raise TplaunchError(Problem(f"cannot keep standard input beside {output}", why=str(error))) from None
        yield [kept if path == STDIN else path for path in inputs]


def _ending(kept: Path) -> str:
    """Of what came from standard input: its kind by its beginning, and how it is packed."""
    with kept.open("rb") as file:
        begin = file.read(8)
        packed = next((ending for magic, ending in _MAGIC.items() if begin.startswith(magic)), "")
        file.seek(0)
        try:
            begin = unpacked(file, packed, STDIN).read(1 << 16)
        except DAMAGED:  # said by those that read all of it, with the place
            begin = b""
    return (".jsonl" if begin.lstrip().startswith(b"{") else ".txt") + packed


def shown(path: Path) -> Path:
    """What messages call a file of raw text."""
    return STDIN if _FOLDER in path.parent.name and path.name.startswith("stdin.") else path
