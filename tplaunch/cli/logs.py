"""`tplaunch logs`: what a run's job or one of its ranks prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tplaunch.errors import Problem, TplaunchError

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, its name under runs/, or a job.")]


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="What this rank prints; default: the job.")
    ] = None,
) -> None:
    """Print the log of a run's latest job, or of a rank.

    Example: tplaunch logs -f quickstart --rank 3
    """
    from tplaunch.cli.following import follow_logs, print_new
    from tplaunch.slurm.runs import Follower, find_runs, job_log, rank_log

    found = find_runs([run])
    if len(found) > 1:
        names = ", ".join(str(run.root) for run in found)
        raise TplaunchError(Problem(f"{run} is a sweep of {len(found)} runs", fix=f"name one: {names}"))

    def newest() -> Path:
        return job_log(found[0]) if rank is None else rank_log(found[0], rank)

    if follow:
        follow_logs(found, newest)
    else:
        print_new(Follower(newest))
