"""`tplaunch train` and `tplaunch command`: a recipe run on this machine, or as a line to paste."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tplaunch.cli.options import RecipeArgument, SetOption
from tplaunch.errors import Problem, RecipeError

if TYPE_CHECKING:
    from tplaunch.check import Checked
    from tplaunch.rundir import RunDir

RENDEZVOUS_PORT = 29400  # torchrun's default

RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run lives; default: runs/NAME.")
]
ResumeOption = Annotated[
    str, typer.Option("--resume", metavar="auto|none|PATH", help="Go on from the newest checkpoint, none, or this one.")
]


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the torchrun line; start and write nothing.")
    ] = False,
) -> None:
    """Train a recipe on this machine, or go on with it where it stopped.

    Ctrl-C stops after the step, with a checkpoint; the same command goes on.

    Example: tplaunch train recipes/quickstart.yaml --set training.steps=20
    """
    from tplaunch.launch.prepare import check_resume, prepare_data, run_dir_of, steps_done, write_recipe

    checked = _checked(recipe, set_, need_data=not dry_run)
    run = run_dir_of(checked.recipe, run_dir)
    resume = _absolute(resume)
    check_resume(checked, run, resume)
    if dry_run:
        typer.echo(_paste(checked, run, resume, run.last_attempt() + 1))
        return
    if checked.topology.nodes > 1:
        raise RecipeError(
            Problem(
                f"asks for {checked.topology.nodes} nodes, and this command starts processes on one",
                fix=f"tplaunch submit {recipe}, or paste what `tplaunch command {recipe}` prints on every node",
                key="topology.nodes",
            )
        )
    done, steps = steps_done(run), checked.recipe.training.steps
    if done >= steps and resume in ("auto", "none"):
        typer.echo(f"{run.root} is finished: step {done} of {steps} is done; --set training.steps=N trains on")
        return
    from tplaunch.launch.local import run_local

    checked = prepare_data(checked)
    run.create()
    with run.lock():
        write_recipe(checked, run)
        code = run_local(checked, run, resume=resume)
    raise typer.Exit(code)


def command(
    recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None, resume: ResumeOption = "auto"
) -> None:
    """Make the data and the run directory ready, and print the torchrun line to paste.

    For several nodes, run it on one of them, where the run directory is shared; every node takes the same line.

    Example: tplaunch command recipes/quickstart.yaml
    """
    from tplaunch.launch.prepare import check_resume, prepare_data, run_dir_of, write_recipe

    checked = _checked(recipe, set_, need_data=True)
    run = run_dir_of(checked.recipe, run_dir)
    resume = _absolute(resume)
    check_resume(checked, run, resume)
    checked = prepare_data(checked)
    run.create()
    with run.lock():
        write_recipe(checked, run)
        attempt = run.next_attempt()
    typer.echo(_paste(checked, run, resume, attempt))


def _checked(recipe: str, set_: list[str] | None, *, need_data: bool) -> Checked:
    """The recipe, checked against this machine; warnings are printed."""
    from tplaunch.check import check_recipe
    from tplaunch.launch.machine import count_gpus
    from tplaunch.recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    gpus = count_gpus() * loaded.recipe.topology.nodes
    if loaded.recipe.topology.async_tp and not gpus:
        typer.echo("warning: topology.async_tp is off: its fused matmuls are for CUDA GPUs, and none is here", err=True)
    checked = check_recipe(loaded, gpus=gpus or None, need_data=need_data)
    for warning in checked.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return checked


def _absolute(resume: str) -> str:
    return resume if resume in ("auto", "none") else str(Path(resume).absolute())


def _paste(checked: Checked, run: RunDir, resume: str, attempt: int) -> str:
    """The topology as a comment, and the torchrun line of one attempt."""
    from tplaunch.launch.console import describe
    from tplaunch.launch.torchrun import Rendezvous, shell_line, torchrun_argv, torchrun_environment

    topology, launch = checked.topology, checked.recipe.launch
    one_node = topology.nodes == 1
    rendezvous = Rendezvous(
        topology.nodes, f"{os.uname().nodename}:{RENDEZVOUS_PORT}", f"{checked.recipe.name}-{attempt}"
    )
    argv = torchrun_argv(
        run.root.absolute(),
        topology.ranks_per_node,
        rendezvous=None if one_node else rendezvous,
        max_restarts=launch.max_restarts,
    )
    environment = torchrun_environment(
        topology.ranks_per_node, attempt=attempt, resume=resume, grace_s=launch.slurm.grace, one_node=one_node
    )
    where = "" if one_node else f"\n# the same line on each of the {topology.nodes} nodes"
    return f"# {checked.recipe.name}: {describe(checked)}{where}\n{shell_line(argv, environment)}"
