"""`evaluations.jsonl`: what checkpoints of a run were found to know, a line a text or a list of questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tplaunch.files import Record, append_line, read_lines
from tplaunch.recipe.schema import task_name
from tplaunch.run.directory import RunDir
from tplaunch.run.records import is_step

_FIGURES = ("loss", "perplexity", "bits_per_byte", "acc", "acc_norm", "acc_bytes")


def metrics_of(data: str, figures: Mapping[str, Any], name: str | None = None) -> dict[str, float]:
    """Figures as metrics of a run, `eval/NAME/loss` and so on.

    Args:
        data: the path of the text or the questions.
        figures: theirs; others are left out.
        name: of the task; default: the file's.
    """
    task = name or task_name(data)
    return {f"eval/{task}/{key}": figures[key] for key in _FIGURES if figures.get(key) is not None}


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
