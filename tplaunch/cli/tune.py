"""`tplaunch tune`: the fastest topologies for a model on so many GPUs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.common import echo_json, planned, write_text
from tplaunch.cli.options import GpuOption, JsonOption, RecipeArgument, SetOption
from tplaunch.errors import Problem, RecipeError

if TYPE_CHECKING:
    from tplaunch.plan.tune import Tuning


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
    """Find the fastest topologies for so many GPUs.

    By prediction, for the recipe's model and batch, and its stages before the first that names a topology. Looks at
    every tp, cp, pp, dp, schedule, virtual stages, micro batch, recomputation and ZeRO stage that can run; with experts
    at every ep, and at expert_tp = tp.

    Example: tplaunch tune recipes/llama3-70b.yaml --gpus 512 --write best.yaml
    """
    from tplaunch.plan.tune import tune as search
    from tplaunch.plan.tune_run import tuned_stages

    loaded, checked, case = planned(recipe, set_, gpu)
    run = tuned_stages(loaded.recipe, checked.recipe, case.gpu)
    if run is None:
        fix = "say it as topology of the recipe, which the stages have that name none"
        raise RecipeError(Problem("has a topology of its own", fix=fix, key="training.stages[0].topology"))
    tuning = search(run.cases[run.main], gpus, node_size=loaded.recipe.topology.gpus_per_node, run=run)
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
        echo_json(_tuning_json(tuning))
    else:
        from tplaunch.cli.output import echo
        from tplaunch.cli.views.tune import tuning_text

        echo(tuning_text(tuning, gpus, run))
    if write is not None:
        from tplaunch.plan.write import tuned_recipe

        write_text(write, tuned_recipe(loaded, set_ or (), tuning.choices[0], write), "--write")
        if not as_json:
            file = shlex.quote(str(write))
            typer.echo(f"wrote {file}: tplaunch plan {file}")


def _tuning_json(tuning: Tuning) -> dict[str, Any]:
    return {
        "legal": tuning.legal,
        "fitting": tuning.fitting,
        "choices": [
            {
                "set": str(choice.change),
                "reason": choice.reason,
                **choice.plan.as_dict(),
                **choice.run.sums(),
                **({"stages": [stage.number + 1 for stage in choice.run.stages]} if choice.run.staged else {}),
            }
            for choice in tuning.choices
        ],
        "neighbours": [{"set": str(n.change), "why": n.why} for n in tuning.neighbours],
    }
