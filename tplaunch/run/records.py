"""Records of `metrics.jsonl`, read as what they are: lines of a file that people can touch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from tplaunch.files import Record

# The figures that readers calculate with or format. Other names are nobody's but their writer's.
_FIGURES = frozenset(("time", "loss", "loss_last", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "mfu"))
_TAIL = 4096  # bytes: some records


def parse_records(data: bytes) -> tuple[list[Record], int]:
    """Parse metrics records.

    Returns:
        The records, in order, and how many lines are none: no JSON object, one without a step, or with a figure that
        is neither a number nor null. Empty lines, and a last line that is still being written, do not count.
    """
    lines = data.split(b"\n")
    parsed = [_parse(line) for line in lines]
    bad = sum(record is None for line, record in zip(lines[:-1], parsed[:-1], strict=True) if line.strip())
    return [record for record in parsed if record is not None], bad


def read_records(path: Path) -> tuple[list[Record], int]:
    """Parse a file of metrics records; a missing file has none."""
    return parse_records(path.read_bytes()) if path.exists() else ([], 0)


def read_last(path: Path) -> Record:
    """The newest value of each figure in the last records of a file, read from its end; {} where it has none.

    Records of a long run are many: what lies more than a few before the last one is not looked at.
    """
    try:
        with path.open("rb") as file:
            size, span = os.fstat(file.fileno()).st_size, _TAIL
            while True:
                start = max(0, size - span)
                file.seek(start)
                data = file.read(size - start)
                whole = data[data.find(b"\n") + 1 :] if start else data
                records = parse_records(whole)[0]
                if records or not start:
                    return {key: value for record in records for key, value in record.items()}
                span *= 16
    except OSError:
        return {}


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_step(record.get("step")):
        return None
    figures = [name for name in record if name in _FIGURES or name.startswith("validation/")]
    return record if all(_is_figure(record[name]) for name in figures) else None


def is_step(value: Any) -> bool:
    """Whether a value is the number of a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_figure(value: Any) -> bool:
    if value is None:
        return True
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e100 < value < 1e100
