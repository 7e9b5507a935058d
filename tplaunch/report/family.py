"""Which runs branched from which: what a run goes on from, and the tree that it stands in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tplaunch.files import parse_lines
from tplaunch.run.directory import RunDir, runs_under
from tplaunch.run.events import Branched, parse_event

_LINE = f'{{"event": "{Branched.name}"'.encode()  # how a line begins (`files.to_line`): events of weeks are many


def parent_of(run: RunDir) -> Branched | None:
    """The run that a run branched from; `History.parent`, without the rest of its events."""
    try:
        lines = [line for line in run.events.read_bytes().splitlines() if line.startswith(_LINE)]
    except (OSError, ValueError):  # of no name that a file can have
        return None
    found = [event for line in parse_lines(b"\n".join(lines)) if isinstance(event := parse_event(line), Branched)]
    return found[-1] if found else None


def ancestors(run: RunDir) -> Iterator[tuple[RunDir, int]]:
    """The runs that a run goes on from, the nearest first, and the step at which each was left."""
    seen = {run.root.absolute()}
    while (known := parent_of(run)) is not None and Path(known.parent) not in seen:
        run = RunDir(Path(known.parent))
        seen.add(run.root)
        yield run, known.step


def family(run: RunDir) -> list[tuple[int, RunDir]]:
    """The tree that a run stands in, as (depth, run): each followed by its branches, in the order of their steps. A run
    without any is alone in it.

    Branches are looked for beside the run and those that it goes on from.
    """
    run = RunDir(run.root.absolute())
    line = [run, *(one for one, _ in ancestors(run) if one.recipe.exists())]
    branches: dict[Path, list[tuple[int, Path]]] = {}
    for path in {found.root for one in line for found in runs_under(one.root.parent)} | {run.root}:
        if (known := parent_of(RunDir(path))) is not None:
            branches.setdefault(Path(known.parent), []).append((known.step, path))
    found, waiting = dict[Path, int](), [(0, line[-1].root)]
    while waiting:
        depth, path = waiting.pop()
        if path not in found:
            found[path] = depth
            waiting += [(depth + 1, branch) for _, branch in sorted(branches.get(path, ()), reverse=True)]
    return [(depth, RunDir(path)) for path, depth in found.items()]
