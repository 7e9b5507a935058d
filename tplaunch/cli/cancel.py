"""`tplaunch cancel`: stop runs of a Slurm cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from tplaunch.cli.output import short_path


def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, names under runs/, or jobs.")],
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
) -> None:
    """Stop runs, with a checkpoint.

    They finish their step, save, and end with exit code 75.

    Example: tplaunch cancel quickstart
    """
    from tplaunch.slurm.runs import cancel_run, find_runs

    for run in find_runs(runs):
        for line in cancel_run(run, now=now) or ["no job of it waits or runs"]:
            typer.echo(f"{short_path(run.root)}: {line}")
