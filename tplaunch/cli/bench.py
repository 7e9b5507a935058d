"""`tplaunch bench`: what a recipe's steps take on this machine."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.common import checked_here, echo_json
from tplaunch.cli.options import JsonOption, RecipeArgument, SetOption
from tplaunch.cli.output import echo
from tplaunch.errors import Problem, RecipeError, TplaunchError

if TYPE_CHECKING:
    from tplaunch.bench.run import Bench
    from tplaunch.check.recipe import Checked
    from tplaunch.plan.estimate import Plan


def bench(
    recipe: RecipeArgument,
    set_: SetOption = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps to time, after 3 to warm up.")] = 10,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="FILE.json", help="Measure this machine, too, for `plan --gpu FILE.json`."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a recipe's steps on this machine.

    On random tokens: tokens/s, MFU, and where the time goes.

    Example: tplaunch bench quickstart --calibrate machine.json
    """
    from tplaunch.bench.run import run_bench
    from tplaunch.cli.views.bench import bench_text
    from tplaunch.spec.gpu import write_gpu

    checked = _checked(recipe, set_)
    if calibrate is not None and calibrate.suffix != ".json":
        raise TplaunchError(Problem(f"{calibrate}: a GPU description is JSON", fix="FILE.json", key="--calibrate"))
    result = run_bench(checked, steps=steps, calibrate=calibrate is not None)
    plan = result.plan()
    if calibrate is not None and result.gpu is not None:
        try:
            write_gpu(result.gpu, calibrate)
        except OSError as error:
            raise TplaunchError(Problem(f"cannot write {calibrate}", why=str(error), key="--calibrate")) from error
    if as_json:
        echo_json(_as_json(result, plan))
        return
    echo(bench_text(result, plan))
    if calibrate is not None:
        file = shlex.quote(str(calibrate))
        typer.echo(f"wrote {file}: tplaunch plan {shlex.quote(recipe)} --gpu {file}")


def _checked(recipe: str, set_: list[str] | None) -> Checked:
    checked = checked_here(recipe, set_, need_data=False, warn=False)
    if checked.topology.nodes > 1:
        raise RecipeError(
            Problem(
                f"asks for {checked.topology.nodes} nodes, and a bench runs on one",
                fix=f"--set topology.dp=1, say; `tplaunch plan {shlex.quote(recipe)}` predicts what this machine "
                "cannot hold",
                key="topology.nodes",
            )
        )
    return checked


def _as_json(result: Bench, plan: Plan | None) -> dict[str, Any]:
    measured = {key: value for key, value in asdict(result).items() if key != "checked"}
    figures = {"tokens_per_s": result.tokens_per_second, "tflops_per_gpu": result.flops_per_gpu / 1e12}
    predicted = {"planned_step_seconds": plan.step_seconds, "mfu": result.mfu(plan)} if plan else {}
    return {**measured, **figures, **predicted}
