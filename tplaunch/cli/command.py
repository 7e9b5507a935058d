"""`tplaunch command`: a recipe as the torchrun line to paste."""

from __future__ import annotations

import typer

from tplaunch.cli.common import Told, checked_here
from tplaunch.cli.options import AllowOption, FromOption, RecipeArgument, ResumeOption, RunDirOption, SetOption


def command(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = "auto",
    parent: FromOption = None,
    allow: AllowOption = None,
) -> None:
    """Print the torchrun line of a recipe, to paste.

    Makes the data and the run directory ready. For several nodes, run it on one of them, where the run
    directory is shared; every node takes the same line.

    Example: tplaunch command recipes/quickstart.yaml
    """
    from tplaunch.launch.prepare import absolute_resume, make_ready, run_dir_of, write_ready
    from tplaunch.launch.torchrun import pasteable

    checked = checked_here(recipe, set_, need_data=True)
    run = run_dir_of(checked.recipe, run_dir)
    resume = absolute_resume(resume)
    ready = make_ready(checked, run, resume=resume, allow=allow or (), parent=parent)
    Told()(ready)
    run.create()
    with run.lock():
        write_ready(ready, run)
        attempt = run.next_attempt()
    typer.echo(pasteable(ready.checked, run, resume, attempt))
