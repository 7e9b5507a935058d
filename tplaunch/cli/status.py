"""`tplaunch status`: how the runs stand that were submitted to Slurm."""

from __future__ import annotations

import dataclasses

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption, RunsArgument


def status(runs: RunsArgument = None, as_json: JsonOption = False) -> None:
    """Show how the runs that were submitted stand.

    Example: tplaunch status
    """
    from tplaunch.cli.views.runs import print_runs
    from tplaunch.slurm.runs import find_runs, statuses_of

    found = statuses_of(find_runs(runs or ()))
    if as_json:
        rows = [dataclasses.asdict(row) for row in found]
        echo_json([{**row, "run": str(row["run"])} for row in rows])
    elif found:
        print_runs(found)
    else:
        typer.echo("no run under runs/ was submitted to Slurm; the first: tplaunch submit RECIPE")
