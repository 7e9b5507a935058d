"""Runs as a table for the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from tplaunch.cli.output import short_path
from tplaunch.run.directory import RunDir
from tplaunch.slurm.runs import RunStatus
from tplaunch.units import format_count, format_duration


def print_runs(found: list[RunStatus]) -> None:
    """Print a table of runs, a line each."""
    table = Table(box=None, pad_edge=False)
    for title in ("run", "job", "state", "nodes", "attempt", "step", "loss", "tokens/s", "left"):
        table.add_column(title, justify="right" if title in ("attempt", "step", "loss", "tokens/s", "left") else "left")
    table.add_column("why", overflow="fold")
    for row in found:
        table.add_row(
            short_path(row.run),
            row.job,
            row.state,
            row.nodes,
            str(row.attempt),
            f"{row.step or 0}/{row.steps}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.tokens_per_s is None else format_count(row.tokens_per_s),
            "" if row.seconds_left is None else format_duration(row.seconds_left),
            "; ".join(filter(None, (row.why, _left_out(row)))),
        )
    # Where nobody looks, no line is broken: they may be searched.
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def _left_out(row: RunStatus) -> str:
    bad = RunDir(row.run).count_bad_metrics()
    return f"{bad} bad line{'s' * (bad > 1)} of metrics.jsonl left out" if bad else ""
