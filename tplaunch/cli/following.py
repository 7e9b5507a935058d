"""Printing a log while its run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from tplaunch.errors import Exit
from tplaunch.run.directory import RunDir
from tplaunch.slurm.runs import Follower, wait_for


def follow_logs(runs: Sequence[RunDir], newest: Callable[[], Path]) -> Exit:
    """Print what is added to a log until no job of the runs waits or runs.

    Args:
        newest: the log to read now; asked each time.
    """
    log = Follower(newest)
    return wait_for(runs, lambda: print_new(log), lambda text: typer.echo(text, err=True))


def print_new(log: Follower) -> None:
    """Print what a log has got since the last call."""
    for text in log.read():
        typer.echo(text, nl=False)
