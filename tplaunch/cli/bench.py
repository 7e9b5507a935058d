"""`tplaunch bench`: what a recipe's steps take on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.options import JsonOption, RecipeArgument, SetOption
from tplaunch.errors import Problem, RecipeError, TplaunchError

if TYPE_CHECKING:
    from tplaunch.bench.run import Bench
    from tplaunch.check import Checked
    from tplaunch.hardware import Gpu
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
    """Time a recipe's steps on this machine, on random tokens: tokens/s, MFU, and where the time goes.

    Example: tplaunch bench quickstart --calibrate machine.json
    """
    from tplaunch.bench.run import run_bench
    from tplaunch.hardware import local_gpu, write_gpu

    checked = _checked(recipe, set_)
    if calibrate is not None and calibrate.suffix != ".json":
        raise TplaunchError(Problem(f"{calibrate}: a GPU description is JSON", fix="FILE.json", key="--calibrate"))
    result = run_bench(checked, steps=steps, calibrate=calibrate is not None)
    plan = _plan(checked, result.gpu or local_gpu())
    if calibrate is not None and result.gpu is not None:
        try:
            write_gpu(result.gpu, calibrate)
        except OSError as error:
            raise TplaunchError(Problem(f"cannot write {calibrate}", why=str(error), key="--calibrate")) from error
    if as_json:
        typer.echo(json.dumps(_as_json(checked, result, plan), indent=2))
        return
    _show(checked, result, plan)
    if calibrate is not None:
        typer.echo(f"wrote {calibrate}: tplaunch plan {recipe} --gpu {calibrate}")


def _checked(recipe: str, set_: list[str] | None) -> Checked:
    from tplaunch.check import check_recipe
    from tplaunch.launch.machine import count_gpus
    from tplaunch.recipe.load import load_recipe

    checked = check_recipe(load_recipe(recipe, set_ or ()), gpus=count_gpus() or None, need_data=False)
    if checked.topology.nodes > 1:
        raise RecipeError(
            Problem(
                f"asks for {checked.topology.nodes} nodes, and a bench runs on one",
                fix=f"--set topology.dp=1, say; `tplaunch plan {recipe}` predicts what this machine cannot hold",
                key="topology.nodes",
            )
        )
    return checked


def _plan(checked: Checked, gpu: Gpu | None) -> Plan | None:
    """What the planner says of the same steps on this GPU, where it knows it."""
    from tplaunch.plan.case import Case
    from tplaunch.plan.estimate import estimate

    return estimate(Case(checked.recipe, checked.topology, gpu)) if gpu else None


def _as_json(checked: Checked, result: Bench, plan: Plan | None) -> dict[str, Any]:
    from dataclasses import asdict

    figures = {"tokens_per_s": _rate(checked, result), "tflops_per_gpu": _flops(checked, result) / 1e12}
    predicted = {"planned_step_seconds": plan.step_seconds, "mfu": _mfu(checked, result, plan)} if plan else {}
    return {**asdict(result), **figures, **predicted}


def _step(result: Bench) -> float:
    from statistics import median

    return median(result.seconds)


def _rate(checked: Checked, result: Bench) -> float:
    """Tokens/s of the world, in the median step."""
    training = checked.recipe.training
    return training.global_batch_size * training.seq_len / _step(result)


def _flops(checked: Checked, result: Bench) -> float:
    """Model FLOP/s of one rank."""
    from tplaunch.arithmetic import model_flops_per_token

    per_token = model_flops_per_token(checked.recipe.model, checked.recipe.training.seq_len)
    return _rate(checked, result) * per_token / checked.topology.world_size


def _mfu(checked: Checked, result: Bench, plan: Plan) -> float:
    return _flops(checked, result) / plan.case.gpu.peak[checked.recipe.training.precision]


def _show(checked: Checked, result: Bench, plan: Plan | None) -> None:
    from tplaunch.cli.output import echo
    from tplaunch.launch.console import describe
    from tplaunch.plan.terminal import columns
    from tplaunch.units import format_bytes

    step = _step(result)
    lines = [
        f"{checked.recipe.name}: {describe(checked)}",
        f"step      {step:.3g} s, the median of {len(result.seconds)} "
        f"({min(result.seconds):.3g} to {max(result.seconds):.3g})",
        f"tokens/s  {_rate(checked, result):,.0f}",
        f"TFLOP/s   {_flops(checked, result) / 1e12:.3g} per rank",
    ]
    if plan is not None:
        lines.append(f"MFU       {_mfu(checked, result, plan):.1%} of {plan.case.gpu.name}")
        lines.append(f"planned   {plan.step_seconds:.3g} s a step, {plan.step_seconds / step - 1:+.0%}")
    lines.append(f"memory    {format_bytes(result.peak_memory)} at most on a rank")
    echo("\n".join(lines))
    rest = step - sum(result.kernels.values())
    kernels = {**result.kernels, "communication, waiting, Python": max(0.0, rest)}
    for title, seconds in (("parts of a step", result.parts), ("kernels of a step", kernels)):
        rows = [[name, f"{value:.3g} s", f"{value / step:.0%}"] for name, value in seconds.items()]
        echo(columns(f"\n{title}, mean of the ranks", ["", "", ""], rows, frozenset({0})))
