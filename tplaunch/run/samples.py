"""`samples.jsonl`: texts that the model wrote at the steps that `logging.samples` asks for, a line a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tplaunch.files import Record, append_lines, read_lines
from tplaunch.run.directory import RunDir
from tplaunch.run.metrics import drop_after

COLUMNS = ("step", "prompt", "text")  # the text is what follows the prompt


class SamplesLog:
    """Appends texts; used by one rank.

    Args:
        run_dir: an existing run directory.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.path = run_dir.samples

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the texts of one step, all at once; each holds `COLUMNS`."""
        append_lines(self.path, rows)

    def truncate_after(self, step: int) -> None:
        """Drop the texts of later steps (`MetricsLog.truncate_after`)."""
        drop_after(self.path, step)


def read_samples(run_dir: RunDir) -> list[Record]:
    """The texts of a run, oldest first."""
    return [line for line in read_lines(run_dir.samples) if isinstance(line.get("text"), str)]
