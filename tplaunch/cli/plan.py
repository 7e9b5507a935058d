"""`tplaunch plan`: what every rank of a recipe will hold, move and cost."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.common import check_rank, data_lines, echo_json, planned, write_text
from tplaunch.cli.options import GpuOption, JsonOption, RecipeArgument, SetOption
from tplaunch.errors import Exit, Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.check.recipe import Checked
    from tplaunch.plan.case import Case
    from tplaunch.plan.remedies import Remedy
    from tplaunch.plan.run import RunPlan


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: GpuOption = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Also show this rank: its place, groups, stages.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE.svg|.json", help="Write the pipeline's step as picture or trace."),
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", metavar="FILE.svg", help="Draw rate, batch, mixture and stages over the run."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what each rank holds, moves and costs; if it fits.

    Needs no GPU, no data and no torch. Ends with 2 when the recipe does not fit, and says what would make it fit.

    Example: tplaunch plan recipes/llama3-70b.yaml --timeline step.svg
    """
    from tplaunch.plan.run import plan_run

    for path, option, endings in ((timeline, "--timeline", (".svg", ".json")), (schedule, "--schedule", (".svg",))):
        if path is not None:
            _check_picture(path, option, endings)
    _, checked, case = planned(recipe, set_, gpu)
    whole = plan_run(checked.recipe, case.gpu)
    result = whole.fullest.plan
    case = result.case
    check_rank(rank, case)
    found: list[Remedy] = []
    if not result.fits:
        from tplaunch.plan.remedies import remedies

        found = remedies(result)
    if as_json:
        echo_json(_as_json(checked, whole, found))
    else:
        _show(checked, whole, found, rank)
    if timeline is not None:
        _write_timeline(case, timeline, quiet=as_json)
    if schedule is not None:
        _write_schedule(whole, schedule, quiet=as_json)
    if not result.fits:
        raise typer.Exit(Exit.USAGE)


def _as_json(checked: Checked, whole: RunPlan, found: list[Remedy]) -> dict[str, Any]:
    from tplaunch.data.amounts import amounts, unlearned, worn_out
    from tplaunch.plan.recomputation import part_costs

    changes = [
        {
            "set": str(remedy.change),
            "slower_per_gpu": remedy.price,
            "gpus": remedy.plan.case.topology.world_size,
            "total": remedy.plan.memory[remedy.plan.fullest].total,
        }
        for remedy in found
    ]
    data, parts = amounts(checked.recipe), [cost._asdict() for cost in part_costs(whole.fullest.plan)]
    warnings = [str(problem) for problem in (*checked.warnings, *worn_out(data), *unlearned(data))]
    return {
        **whole.as_dict(),
        "recompute_parts": parts,
        "remedies": changes,
        "data": [asdict(one) for one in data],
        "warnings": warnings,
    }


def _show(checked: Checked, whole: RunPlan, found: list[Remedy], rank: int | None) -> None:
    from tplaunch.cli.output import echo
    from tplaunch.cli.views.plan import plan_text

    own = whole.fullest.plan.case
    timeline = None
    if 1 < own.topology.pp <= 16 and own.microbatches * own.virtual_stages <= 50:  # else its cells would say nothing
        from tplaunch.plan.timeline import pipeline_timeline

        timeline, _ = pipeline_timeline(own)
    echo(plan_text(whole, found, rank=rank, timeline=timeline))
    echo("\n".join(data_lines(checked.recipe)))
    for problem in checked.warnings:
        if not problem.key.startswith("data."):
            echo(typer.style(f"warning: {problem}", fg="yellow"))


def _check_picture(path: Path, option: str, endings: tuple[str, ...]) -> None:
    """Refuse, before anything is planned, a file that a picture cannot become."""
    if path.suffix not in endings:
        what = "a timeline is a picture or a trace" if len(endings) > 1 else "a schedule is a picture"
        raise TplaunchError(
            Problem(f"{path}: {what}", fix=" or ".join(f"FILE{ending}" for ending in endings), key=option)
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise TplaunchError(Problem(f"cannot write {path}", why=why, key=option))


def _write_timeline(case: Case, path: Path, *, quiet: bool) -> None:
    from tplaunch.plan.timeline import pipeline_timeline, timeline_svg, timeline_trace

    timeline, shown = pipeline_timeline(case)
    part = "" if shown == case.microbatches else f", first {shown} of {case.microbatches} microbatches"
    title = f"{case.recipe.name}: {case.schedule} on {case.topology.pp} pipeline ranks{part}"
    write_text(path, timeline_svg(timeline, title) if path.suffix == ".svg" else timeline_trace(timeline), "--timeline")
    if not quiet:
        viewer = "any browser" if path.suffix == ".svg" else "https://ui.perfetto.dev or chrome://tracing"
        typer.echo(f"wrote {shlex.quote(str(path))}: open it in {viewer}")


def _write_schedule(whole: RunPlan, path: Path, *, quiet: bool) -> None:
    import shutil
    from importlib.util import find_spec

    from tplaunch.cli.output import echo
    from tplaunch.cli.views.schedule import stage_bars
    from tplaunch.report.schedule import schedule_charts, schedule_svg

    course = whole.course
    write_text(path, schedule_svg(course), "--schedule")
    if quiet:
        return
    width = shutil.get_terminal_size().columns
    if find_spec("plotext") is not None:  # else the picture, and what needs no more than letters
        from tplaunch.report.terminal import terminal_charts

        echo(terminal_charts(schedule_charts(course), width, colour=False))
    for line in stage_bars(course, width):
        echo(line)
    typer.echo(f"wrote {shlex.quote(str(path))}: open it in any browser")
