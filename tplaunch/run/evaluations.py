"""`evaluations.jsonl`: what checkpoints of a run were found to know, a line a text or a list of questions."""

from __future__ import annotations

from tplaunch.files import Record, append_line, read_lines
from tplaunch.run.directory import RunDir
from tplaunch.run.records import is_step


def append_evaluation(run_dir: RunDir, record: Record) -> None:
    """Append a result; any process may.

    Args:
        record: with `step`, `time` (unix seconds), `data` (a path as it was given), `kind` (text or choices) and the
            figures.
    """
    append_line(run_dir.evaluations, record)


def read_evaluations(run_dir: RunDir) -> list[Record]:
    """The results of a run, oldest first."""
    found = read_lines(run_dir.evaluations)
    return [line for line in found if is_step(line.get("step")) and isinstance(line.get("data"), str)]
