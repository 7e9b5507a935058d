"""`tplaunch submit`, `status`, `logs`, `cancel`: runs on a Slurm cluster."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tplaunch.cli.options import JsonOption, RecipeArgument, SetOption
from tplaunch.errors import Exit, Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.launch.slurm_runs import Follower, RunStatus
    from tplaunch.launch.slurm_submit import Submission
    from tplaunch.rundir import RunDir

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, its name under runs/, or a job.")]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Run directories, names under runs/, or jobs.")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run goes; default runs/NAME.")
]


def submit(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Values to try, each in a run of its own; several make their product."),
    ] = None,
    chain: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="N jobs that go on from each other, instead of requeues.")
    ] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended, with its exit code.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="The same, and show the job's log.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, change nothing.")] = False,
) -> None:
    """Train on a Slurm cluster: prepare the data, write the batch script, submit it.

    Example: tplaunch submit recipes/quickstart.yaml --set topology.nodes=2 --set launch.slurm.time=4h
    """
    from tplaunch.launch.slurm_runs import wait_for
    from tplaunch.launch.slurm_submit import plan_submission, send

    if follow and sweep:
        raise TplaunchError(Problem("--follow shows one log, a sweep has many", fix="--wait, or tplaunch logs -f RUN"))
    submission = plan_submission(
        recipe, set_ or (), sweep=sweep or (), run_dir=run_dir, chain=chain > 1, need_data=not dry_run
    )
    if dry_run:
        typer.echo(submission.script(), nl=False)
        return
    for warning in (warning for member in submission.members[:1] for warning in member.checked.warnings):
        typer.echo(f"warning: {warning}", err=True)
    jobs = send(submission, chain=chain)
    _report(submission, jobs)
    runs = [member.run_dir for member in submission.members]
    if follow:
        code = _follow_job(runs[0])
    elif wait:
        code = wait_for(runs)
    else:
        return
    raise typer.Exit(code)


def status(runs: RunsArgument = None, as_json: JsonOption = False) -> None:
    """Show how the runs that were submitted stand.

    Example: tplaunch status
    """
    from tplaunch.launch.slurm_runs import find_runs, status_of

    found = [status_of(run) for run in find_runs(runs or ())]
    if as_json:
        rows = [dataclasses.asdict(row) for row in found]
        typer.echo(json.dumps([{**row, "run": str(row["run"])} for row in rows]))
    elif found:
        _print_table(found)
    else:
        typer.echo("no run under runs/ was submitted to Slurm; the first: tplaunch submit RECIPE")


def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="What this rank prints; default: the job.")
    ] = None,
) -> None:
    """Print the log of a run's latest job, or of one of its ranks.

    Example: tplaunch logs -f quickstart --rank 3
    """
    from tplaunch.launch.slurm_runs import Follower, find_runs, job_log, rank_log, wait_for

    found = find_runs([run])
    if len(found) > 1:
        names = ", ".join(str(run.root) for run in found)
        raise TplaunchError(Problem(f"{run} is a sweep of {len(found)} runs", fix=f"name one: {names}"))
    log = Follower(lambda: job_log(found[0]) if rank is None else rank_log(found[0], rank))
    if follow:
        wait_for(found, lambda: _print_new(log))
    else:
        _print_new(log)


def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, names under runs/, or jobs.")],
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
) -> None:
    """Stop runs: they finish their step, save, and end with exit code 75.

    Example: tplaunch cancel quickstart
    """
    from tplaunch.launch import slurm_runs

    for run in slurm_runs.find_runs(runs):
        for line in slurm_runs.cancel(run, now=now) or ["no job of it waits or runs"]:
            typer.echo(f"{_short(run.root)}: {line}")


def _report(submission: Submission, jobs: list[str]) -> None:
    from tplaunch.launch import slurm

    rows = [("job", " -> ".join(jobs))]
    place = slurm.queue_position(jobs[0])
    if place is not None:
        rows += [("queue", f"place {place[0]} of {place[1]} in its partition")]
    job = slurm.find_job(jobs[0])
    if job is not None and job.state == "PENDING":
        start = f"{job.start:%Y-%m-%d %H:%M:%S}, as Slurm expects" if job.start else "not known yet"
        rows += [("start", start)]
    elif job is not None:
        rows += [("state", job.state.lower())]
    if len(submission.members) > 1:
        rows += [("runs", str(submission.root))]
        rows += [("", member.run_dir.root.name) for member in submission.members]
        rows += [("logs", str(submission.log_dir / f"{jobs[0]}_*.log"))]
    else:
        rows += [("run", str(submission.root)), ("log", str(submission.log_dir / f"{jobs[0]}.log"))]
    rows += [("next", f"tplaunch status {jobs[0]}, logs -f {jobs[0]}, cancel {jobs[0]}")]
    for label, text in rows:
        typer.echo(f"{label:<7}{text}")


def _print_table(found: list[RunStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tplaunch.units import format_count, format_duration

    table = Table(box=None, pad_edge=False)
    for title in ("run", "job", "state", "nodes", "attempt", "step", "loss", "tokens/s", "left"):
        table.add_column(title, justify="right" if title in ("attempt", "step", "loss", "tokens/s", "left") else "left")
    table.add_column("why", overflow="fold")
    for row in found:
        table.add_row(
            _short(row.run),
            row.job,
            row.state,
            row.nodes,
            str(row.attempt),
            f"{row.step or 0}/{row.steps}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.tokens_per_s is None else format_count(row.tokens_per_s),
            "" if row.seconds_left is None else format_duration(row.seconds_left),
            row.why,
        )
    # Where nobody looks, no line is broken: they may be searched.
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def _short(path: Path) -> str:
    """A path from here, where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _follow_job(run_dir: RunDir) -> Exit:
    from tplaunch.launch.slurm_runs import Follower, job_log, wait_for

    log = Follower(lambda: job_log(run_dir))
    return wait_for([run_dir], lambda: _print_new(log))


def _print_new(log: Follower) -> None:
    for text in log.read():
        typer.echo(text, nl=False)
