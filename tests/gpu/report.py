"""What `run.py` keeps and prints. Imports nothing but the standard library: it runs before anything is installed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIGURES = "TPLAUNCH_GPU_FIGURES"  # the folder into which a part writes JSON files of figures


@dataclass
class Outcome:
    """How one part went.

    Args:
        result: "passed", "failed", "timed out", "left out" or "not measured".
        seconds: that it took.
        figures: what it measured, by test or measurement.
        said: the end of its output, where it did not pass; the reasons of what was skipped.
    """

    part: str
    result: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def write(folder: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write `results.json`; called after every part, so that what is there survives an end by force."""
    file = folder / "results.json"
    file.with_suffix(".tmp").write_text(json.dumps({**facts, "parts": [asdict(one) for one in outcomes]}, indent=1))
    file.with_suffix(".tmp").replace(file)


def table(facts: dict[str, Any], outcomes: list[Outcome]) -> str:
    """The report for people."""
    lines = [", ".join(f"{key} {value}" for key, value in facts.items())]
    for one in outcomes:
        lines.append(f"{one.part:<14} {one.result:<12} {one.seconds:6.1f} s")
        for name, figures in one.figures.items():
            lines.append(f"    {name:<40} " + ", ".join(f"{key} {_show(value)}" for key, value in figures.items()))
        if one.said:
            lines += [f"    | {line}" for line in one.said.splitlines()[-12:]]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{len(value)} entries" if isinstance(value, list) else str(value)
