"""`ranks.jsonl`: what each rank measured at the steps that `logging.per_rank_every` asks for, a line a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tplaunch.files import Record, append_lines, read_lines
from tplaunch.run.directory import RunDir
from tplaunch.run.metrics import drop_after

# Of a row, in order; then come the axes' coordinates and what was measured: memory in GiB, seconds of a step.
PLACE = ("step", "rank", "host", "node")
MEASURED = ("memory_peak_gib", "step_time_s", "data_s", "forward_backward_s", "gradients_s", "update_s")


class RanksLog:
    """Appends the rows of all ranks; used by one of them.

    Args:
        run_dir: an existing run directory.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.path = run_dir.ranks

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows of one step, all at once; each holds `step` and `rank`."""
        append_lines(self.path, rows)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps (`MetricsLog.truncate_after`)."""
        drop_after(self.path, step)


def read_ranks(run_dir: RunDir) -> list[Record]:
    """The rows of a run, oldest first."""
    return [row for row in read_lines(run_dir.ranks) if "step" in row and "rank" in row]
