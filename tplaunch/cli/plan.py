"""`tplaunch plan` and `tplaunch tune`: what a recipe will hold, move and cost, and which topology is best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.options import JsonOption, RecipeArgument, SetOption
from tplaunch.errors import Exit, Problem, RecipeError, TplaunchError

if TYPE_CHECKING:
    from tplaunch.check import Checked
    from tplaunch.plan.case import Case
    from tplaunch.plan.estimate import Plan
    from tplaunch.plan.remedies import Remedy

GpuOption = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="Plan for this GPU: a name of the table, or a .json file.")
]


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: GpuOption = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Also show this rank: its place, groups, stages.")] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE.svg|.json", help="Write the pipeline's step as picture or trace."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what every rank will hold, move and cost, and whether it fits.

    Needs no GPU, no data and no torch. Ends with 2 when the recipe does not fit, and says what would make it fit.

    Example: tplaunch plan recipes/llama3-70b.yaml --timeline step.svg
    """
    from tplaunch.plan.estimate import estimate
    from tplaunch.plan.remedies import remedies

    checked, case = _case(recipe, set_, gpu)
    if rank is not None and not 0 <= rank < case.topology.world_size:
        raise TplaunchError(
            Problem(f"there is no rank {rank}", fix=f"0 to {case.topology.world_size - 1}", key="--rank")
        )
    result = estimate(case)
    found = [] if result.fits else remedies(result)
    if as_json:
        typer.echo(json.dumps(_as_json(checked, result, found), indent=2))
    else:
        _show(checked, result, found, rank)
    if timeline is not None:
        _write_timeline(case, timeline, quiet=as_json)
    if not result.fits:
        raise typer.Exit(Exit.USAGE)


def _case(recipe: str, set_: list[str] | None, gpu: str | None) -> tuple[Checked, Case]:
    from tplaunch.check import check_recipe
    from tplaunch.hardware import find_gpu, local_gpu
    from tplaunch.plan.case import Case
    from tplaunch.recipe.load import load_recipe

    overrides = [*(set_ or ()), *([f"hardware.gpu={gpu}"] if gpu else [])]
    checked = check_recipe(load_recipe(recipe, overrides), need_data=False)
    name = checked.recipe.hardware.gpu
    hardware = find_gpu(name) if name else local_gpu()
    if hardware is None:
        raise RecipeError(
            Problem(
                "no GPU to plan for",
                why="the recipe names none, and this machine has none that is known",
                fix="--gpu h100-80gb, or hardware: {gpu: h100-80gb} in the recipe",
                key="hardware.gpu",
            )
        )
    return checked, Case(checked.recipe, checked.topology, hardware)


def _as_json(checked: Checked, result: Plan, found: list[Remedy]) -> dict[str, Any]:
    changes = [
        {
            "set": str(remedy.change),
            "slower_per_gpu": remedy.price,
            "gpus": remedy.plan.case.topology.world_size,
            "total": remedy.plan.memory[remedy.plan.fullest].total,
        }
        for remedy in found
    ]
    return {**result.as_dict(), "remedies": changes, "warnings": [str(problem) for problem in checked.warnings]}


def _show(checked: Checked, result: Plan, found: list[Remedy], rank: int | None) -> None:
    from rich.console import Console

    from tplaunch.plan.terminal import show_plan

    console = Console(highlight=False)
    show_plan(console, result, found, rank=rank)
    for problem in checked.warnings:
        if not problem.key.startswith("data."):
            console.print(f"warning: {problem}", markup=False, style="yellow")


def _write_timeline(case: Case, path: Path, *, quiet: bool) -> None:
    from tplaunch.plan.timeline import pipeline_timeline, timeline_svg, timeline_trace

    if path.suffix not in (".svg", ".json"):
        raise TplaunchError(
            Problem(f"{path}: a timeline is a picture or a trace", fix="FILE.svg or FILE.json", key="--timeline")
        )
    timeline, shown = pipeline_timeline(case)
    part = "" if shown == case.microbatches else f", first {shown} of {case.microbatches} microbatches"
    title = f"{case.recipe.name}: {case.schedule} on {case.topology.pp} pipeline ranks{part}"
    text = timeline_svg(timeline, title) if path.suffix == ".svg" else timeline_trace(timeline)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TplaunchError(Problem(f"cannot write {path}", why=str(error), key="--timeline")) from error
    if not quiet:
        viewer = "any browser" if path.suffix == ".svg" else "https://ui.perfetto.dev or chrome://tracing"
        typer.echo(f"wrote {path}: open it in {viewer}")
