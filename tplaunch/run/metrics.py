"""`metrics.jsonl`, the source of truth of a run's curve; W&B and the console are its readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tplaunch.files import append_line, parse_lines, to_line, write_atomic
from tplaunch.run.directory import RunDir
from tplaunch.run.records import is_step


class MetricsLog:
    """Appends metric records; used by one rank.

    Args:
        run_dir: an existing run directory.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.path = run_dir.metrics

    def append(self, record: Mapping[str, Any]) -> None:
        """Append the record of one step. It is in the file when this returns, and outlives a SIGKILL.

        Args:
            record: flat; holds `step`. Values are JSON values; NaN and infinities are written as null.
        """
        append_line(self.path, record)

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps, which a run that resumes at `step` writes again.

        Torn lines, and those without a step, go too. The file is replaced in one rename, so that a crash leaves the old
        or the new one.
        """
        drop_after(self.path, step)


def drop_after(path: Path, step: int) -> None:
    """Drop the lines of a file of records that are of later steps, torn, or without a step."""
    if not path.exists():
        return
    data = path.read_bytes()
    records = (record for record in parse_lines(data) if is_step(record.get("step")))
    kept = b"".join(to_line(record) for record in records if record["step"] <= step)
    if kept != data:
        write_atomic(path, kept)
