"""`tplaunch train`: a recipe run on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tplaunch.cli.common import Told, checked_here
from tplaunch.cli.options import AllowOption, FromOption, RecipeArgument, ResumeOption, RunDirOption, SetOption
from tplaunch.errors import Exit, Problem, RecipeError
from tplaunch.streams import LostText, steady_streams


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = "auto",
    parent: FromOption = None,
    allow: AllowOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the torchrun line; start and write nothing.")
    ] = False,
) -> None:
    """Train a recipe on this machine, or go on with it.

    Ctrl-C stops after the step, with a checkpoint; the same command goes on.

    Example: tplaunch train recipes/quickstart.yaml --set training.steps=20
    """
    from tplaunch.run.processes import ignoring_profile_signal

    with steady_streams() as lost, ignoring_profile_signal():  # who watches may leave; the run goes on
        code = _train(recipe, set_, run_dir, resume, parent, allow or [], lost, dry_run=dry_run)
    raise typer.Exit(code)


def _train(
    recipe: str,
    set_: list[str] | None,
    run_dir: Path | None,
    resume: str,
    parent: str | None,
    allow: list[str],
    lost: LostText,
    *,
    dry_run: bool,
) -> Exit:
    from tplaunch.launch.prepare import absolute_resume, check_resume, make_ready, run_dir_of, write_ready

    checked = checked_here(recipe, set_, need_data=not dry_run)
    run = run_dir_of(checked.recipe, run_dir)
    resume = absolute_resume(resume)
    check_resume(checked, run, resume, parent)
    if dry_run:
        from tplaunch.launch.torchrun import pasteable

        typer.echo(pasteable(checked, run, resume, run.last_attempt() + 1))
        return Exit.DONE
    if checked.topology.nodes > 1:
        file = shlex.quote(recipe)
        raise RecipeError(
            Problem(
                f"asks for {checked.topology.nodes} nodes, and this command starts processes on one",
                fix=f"tplaunch submit {file}, or paste what `tplaunch command {file}` prints on every node",
                key="topology.nodes",
            )
        )
    done, steps = run.history().steps_done, checked.recipe.training.steps
    if done >= steps and resume in ("auto", "none"):
        typer.echo(f"{run.root} is finished: step {done} of {steps} is done; --set training.steps=N trains on")
        return Exit.DONE
    from tplaunch.launch.local import LocalLaunch
    from tplaunch.launch.torchrun import check_loopback

    check_loopback()
    ready = make_ready(checked, run, resume=resume, allow=allow, parent=parent)
    Told()(ready)
    run.create()
    with run.lock():
        lost.keep_in(run.launch_log)
        write_ready(ready, run)
        return LocalLaunch(ready.checked, run, resume=resume).run()
