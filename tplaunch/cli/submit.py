"""`tplaunch submit`: a recipe as jobs of a Slurm cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tplaunch.cli.common import Told, refuse_export
from tplaunch.cli.options import AllowOption, FromOption, RecipeArgument, RunDirOption, SetOption
from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.slurm.submit import Submission


def submit(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Values to try, each in a run of its own; several make their product."),
    ] = None,
    parent: FromOption = None,
    allow: AllowOption = None,
    chain: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="N jobs that go on from each other, instead of requeues.")
    ] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended, with its exit code.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="The same, and show the job's log.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, change nothing.")] = False,
) -> None:
    """Train a recipe on a Slurm cluster.

    Prepares the data, writes the batch script and submits it.

    Example: tplaunch submit recipes/quickstart.yaml --set topology.nodes=2 --set launch.slurm.time=4h
    """
    from tplaunch.cli.following import follow_logs
    from tplaunch.slurm.runs import job_log, wait_for
    from tplaunch.slurm.submit import plan_submission, send

    if follow and sweep:
        raise TplaunchError(Problem("--follow shows one log, a sweep has many", fix="--wait, or tplaunch logs -f RUN"))
    submission = plan_submission(
        recipe,
        set_ or (),
        sweep=sweep or (),
        run_dir=run_dir,
        chain=chain > 1,
        need_data=not dry_run,
        parent=parent,
    )
    for member in submission.members:
        refuse_export(member.checked.recipe, submission.loaded)
    if dry_run:
        typer.echo(submission.script(), nl=False)
        return
    for warning in (warning for member in submission.members[:1] for warning in member.checked.warnings):
        typer.echo(f"warning: {warning}", err=True)
    jobs = send(submission, chain=chain, allow=allow or (), tell=Told())
    _report(submission, jobs)
    runs = [member.run_dir for member in submission.members]
    if follow:
        code = follow_logs(runs, lambda: job_log(runs[0]))
    elif wait:
        code = wait_for(runs, warn=lambda text: typer.echo(text, err=True))
    else:
        return
    raise typer.Exit(code)


def _report(submission: Submission, jobs: list[str]) -> None:
    from tplaunch.slurm import client

    rows = [("job", " -> ".join(jobs))]
    place = client.queue_position(jobs[0])
    if place is not None:
        rows += [("queue", f"place {place[0]} of {place[1]} in its partition")]
    job = client.find_job(jobs[0])
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
