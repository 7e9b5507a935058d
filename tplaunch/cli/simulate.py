"""`tplaunch simulate`: the real trainer for a few ranks of any world."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from tplaunch.cli.common import check_rank, planned
from tplaunch.cli.options import GpuOption, RecipeArgument, SetOption
from tplaunch.errors import Exit, Problem, TplaunchError


def simulate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: GpuOption = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="N", help="This rank. Default: one of the first, middle and last pipeline rank."
        ),
    ] = None,
) -> None:
    """Run the real trainer for a few ranks of any world.

    On this machine: no weights, no data, no other ranks. Shows what each holds and sends beside what
    `tplaunch plan` says, and ends with 1 when what the ranks of a pipeline or group say to each other does not fit
    together.

    Example: tplaunch simulate llama3-405b
    """
    from tplaunch.cli.output import echo
    from tplaunch.plan.estimate import estimate

    _, _, case = planned(recipe, set_, gpu)
    check_rank(rank, case)
    if not estimate(case).fits:
        what = f"{case.recipe.name} does not fit {case.gpu.name}"
        raise TplaunchError(Problem(what, fix=f"`tplaunch plan {shlex.quote(recipe)}` says what would"))
    from tplaunch.cli.views.simulation import report
    from tplaunch.simulate.world import ends_and_middle, shortened
    from tplaunch.simulate.world import simulate as run

    simulation = run(shortened(case), ends_and_middle(case.topology) if rank is None else [rank])
    echo(report(simulation))
    if simulation.problems:
        raise typer.Exit(Exit.FAILED)
