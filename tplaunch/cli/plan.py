"""`tplaunch plan` and `tplaunch tune`: what a recipe will hold, move and cost, and which topology is best."""

from __future__ import annotations

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
    from tplaunch.plan.tune import Choice, Tuning

GpuOption = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="Plan for this GPU: a name of the table, or a .json file.")
]


_STAND_IN = "h100-80gb"


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

    checked, case = _case(recipe, set_, gpu)
    _check_rank(rank, case)
    result = estimate(case)
    found: list[Remedy] = []
    if not result.fits:
        from tplaunch.plan.remedies import remedies

        found = remedies(result)
    if as_json:
        _echo_json(_as_json(checked, result, found))
    else:
        _show(checked, result, found, rank)
    if timeline is not None:
        _write_timeline(case, timeline, quiet=as_json)
    if not result.fits:
        raise typer.Exit(Exit.USAGE)


def simulate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: GpuOption = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="This rank. Default: one of the first, middle and last pipeline rank.")
    ] = None,
) -> None:
    """Run the real trainer for a few ranks of any world on this machine: no weights, no data, no other ranks.

    Shows what each holds and sends beside what `tplaunch plan` says, and ends with 1 when what the ranks of a pipeline
    or group say to each other does not fit together.

    Example: tplaunch simulate llama3-405b
    """
    from tplaunch.cli.output import echo
    from tplaunch.plan.estimate import estimate

    _, case = _case(recipe, set_, gpu)
    _check_rank(rank, case)
    if not estimate(case).fits:
        what = f"{case.recipe.name} does not fit {case.gpu.name}"
        raise TplaunchError(Problem(what, fix=f"`tplaunch plan {recipe}` says what would"))
    from tplaunch.simulate.report import report
    from tplaunch.simulate.world import ends_and_middle, shortened
    from tplaunch.simulate.world import simulate as run

    simulation = run(shortened(case), ends_and_middle(case.topology) if rank is None else [rank])
    echo(report(simulation))
    if simulation.problems:
        raise typer.Exit(Exit.FAILED)


def _check_rank(rank: int | None, case: Case) -> None:
    if rank is not None and not 0 <= rank < case.topology.world_size:
        raise TplaunchError(
            Problem(f"there is no rank {rank}", fix=f"0 to {case.topology.world_size - 1}", key="--rank")
        )


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
        hardware = find_gpu(_STAND_IN)
        typer.echo(f"no GPU is named or here: planned for {_STAND_IN}, --gpu plans for another", err=True)
    return checked, Case(checked.recipe, checked.topology, hardware)


def _echo_json(value: dict[str, Any]) -> None:
    import json  # not at the top: most answers are text

    typer.echo(json.dumps(value, indent=2))


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
    from tplaunch.cli.output import echo
    from tplaunch.plan.terminal import plan_text

    own = result.case
    timeline = None
    if 1 < own.topology.pp <= 16 and own.microbatches * own.virtual_stages <= 50:  # else its cells would say nothing
        from tplaunch.plan.timeline import pipeline_timeline

        timeline, _ = pipeline_timeline(own)
    echo(plan_text(result, found, rank=rank, timeline=timeline))
    for problem in checked.warnings:
        if not problem.key.startswith("data."):
            echo(typer.style(f"warning: {problem}", fg="yellow"))


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


def tune(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=100_000, metavar="N", help="GPUs that there are.")],
    set_: SetOption = None,
    gpu: GpuOption = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE.yaml", help="Write the best as a recipe that extends this.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest topologies for a recipe's model, batch and GPUs, by prediction.

    Looks at every tp, pp, dp, schedule, virtual stages, micro batch, recomputation and ZeRO stage that can run.

    Example: tplaunch tune recipes/llama3-70b.yaml --gpus 512 --write best.yaml
    """
    from tplaunch.plan.tune import tune as search

    _, case = _case(recipe, set_, gpu)
    tuning = search(case, gpus)
    if not tuning.choices:
        raise RecipeError(
            Problem(
                f"no topology on {gpus} x {case.gpu.name} fits ({tuning.legal} can run)"
                if tuning.legal
                else f"no topology on {gpus} GPUs can run this model with this global batch",
                fix="more GPUs, GPUs with more memory, or a global batch that more numbers divide",
                key="--gpus",
            )
        )
    if as_json:
        _echo_json(_tuning_json(tuning))
    else:
        from tplaunch.cli.output import echo
        from tplaunch.plan.terminal import tuning_text

        echo(tuning_text(tuning, gpus))
    if write is not None:
        _write_recipe(recipe, tuning.choices[0], write)
        if not as_json:
            typer.echo(f"wrote {write}: tplaunch plan {write}")


def _tuning_json(tuning: Tuning) -> dict[str, Any]:
    return {
        "legal": tuning.legal,
        "fitting": tuning.fitting,
        "choices": [{"set": str(c.change), "reason": c.reason, **c.plan.as_dict()} for c in tuning.choices],
        "neighbours": [{"set": str(n.change), "why": n.why} for n in tuning.neighbours],
    }


def _write_recipe(recipe: str, best: Choice, path: Path) -> None:
    import os

    import yaml

    from tplaunch.recipe.shipped import find_recipe

    sections: dict[str, dict[str, Any]] = {}
    for key, value in best.change.values.items():
        section, _, field = key.partition(".")
        sections.setdefault(section, {})[field] = value.model_dump() if hasattr(value, "model_dump") else value
    sections["hardware"] = {"gpu": best.plan.case.gpu.name}
    extends = os.path.relpath(find_recipe(recipe), path.resolve().parent)
    try:
        path.write_text(yaml.safe_dump({"extends": extends, **sections}, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise TplaunchError(Problem(f"cannot write {path}", why=str(error), key="--write")) from error
