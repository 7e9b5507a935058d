"""`tplaunch command`: a recipe as the torchrun line to paste."""

from __future__ import annotations

import typer

from tplaunch.cli.common import checked_here
from tplaunch.cli.options import RecipeArgument, ResumeOption, RunDirOption, SetOption


def command(
    recipe: RecipeArgument, set_: SetOption = None, run_dir: RunDirOption = None, resume: ResumeOption = "auto"
) -> None:
    """Print the torchrun line of a recipe, to paste.

    Makes the data and the run directory ready. For several nodes, run it on one of them, where the run
    directory is shared; every node takes the same line.

    Example: tplaunch command recipes/quickstart.yaml
    """
    from tplaunch.launch.prepare import absolute_resume, check_resume, prepare_data, run_dir_of, write_recipe
    from tplaunch.launch.torchrun import pasteable

    checked = checked_here(recipe, set_, need_data=True)
    run = run_dir_of(checked.recipe, run_dir)
    resume = absolute_resume(resume)
    check_resume(checked, run, resume)
    checked = prepare_data(checked)
    run.create()
    with run.lock():
        write_recipe(checked, run)
        attempt = run.next_attempt()
    typer.echo(pasteable(checked, run, resume, attempt))
