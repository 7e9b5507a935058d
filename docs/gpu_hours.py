"""Write `docs/gpu-hours.md` again: what the planner says of published runs, beside the GPU-hours that were published.

python docs/gpu_hours.py       `tests/docs/test_gpu_hours.py` fails where it was not run after a change of the planner
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "gpu-hours.md"
sys.path[:0] = [str(PAGE.parents[1])]

from tplaunch.check.recipe import check_recipe  # noqa: E402
from tplaunch.plan.run import RunStage, plan_run  # noqa: E402
from tplaunch.recipe.load import load_recipe  # noqa: E402
from tplaunch.spec.gpu import find_gpu  # noqa: E402
from tplaunch.units import format_count  # noqa: E402

HEAD = """\
# GPU-hours of published runs

<!-- Made by `python docs/gpu_hours.py`: not to be edited. -->

What `tplaunch plan` says of whole runs, beside the GPU-hours that their authors published. Nothing is fitted: the plans
are those of the recipes that ship, with the changes that stand beside them.

Published hours hold restarts, downtime, checkpoints and validation; a plan holds steps alone, and an exact one would be
below them: of Llama 3 405B the report counts more than 90 % of the time as effective
([arXiv 2407.21783](https://arxiv.org/abs/2407.21783), section 3.3.4).
"""

LEFT = """
Left for all else is the share of the published hours that the plan does not fill: restarts, downtime, checkpoints and
validation, other work that the hours may hold, and the error of the planner and of the topology, together. TFLOP/s are
model FLOPs over hours: the speed that the hours mean, beside the planner's.
"""
SHARES = """\
Shares of a step, of the last batch size of a stage, on the pipeline rank that computes longest; communication as far as
nothing hides it, `pipeline` what ranks wait for one another. Stages of less than 0.5 % of the hours are left out."""


@dataclass(frozen=True)
class Run:
    """A published run, or a part of one.

    Args:
        name: what it is.
        hours: GPU-hours that were published.
        source: where.
        recipe: that ships.
        changes: of the recipe, as for --set.
        stages: numbers of the stages that are compared, from 1; default: all.
        assumed: what the plan takes to be so, or leaves out.
    """

    name: str
    hours: float
    source: str
    recipe: str
    changes: Sequence[str] = ()
    stages: Sequence[int] = ()
    assumed: str = ""


CARD = "[model card](https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/MODEL_CARD.md)"
DEEPSEEK = "[arXiv 2412.19437](https://arxiv.org/abs/2412.19437), table 1"
RUNS = [
    Run(
        "Llama 3.1 405B",
        30.84e6,
        CARD,
        "llama3-405b",
        assumed="The topologies of the report's table 4 for 8,192 and 131,072 tokens, on 16,384 GPUs throughout, and "
        "between them as many GPUs for a sequence as keep 8,192 tokens on each. With 8 million tokens a step that"
        " makes 8 microbatches for 16 interleaved pipeline ranks, which wait for one another.",
    ),
    Run(
        "the same on 8,192 GPUs",
        30.84e6,
        CARD,
        "llama3-405b",
        changes=("topology.nodes=1024",),
        assumed="The first row of table 4, DP 64, throughout: 16 microbatches, then 32. The report does not tell when "
        "it had how many GPUs.",
    ),
    Run(
        "Llama 3.1 70B",
        7.0e6,
        CARD,
        "llama3-70b",
        changes=("training.tokens=15T",),
        assumed="Topology and batch are the recipe's: the report's are not told. 15T tokens in sequences of 8,192, "
        "without the stages of long ones.",
    ),
    Run(
        "Llama 3.1 8B",
        1.46e6,
        CARD,
        "llama3-8b",
        changes=("training.tokens=15T",),
        assumed="As of 70B. The recipe's single node has no network to wait for.",
    ),
    Run(
        "DeepSeek-V3, pre-training",
        2.664e6,
        DEEPSEEK,
        "deepseek-v3",
        stages=(1,),
        assumed="The report multiplies in FP8, up to twice as fast, sends tokens to experts in FP8 and hides that "
        "behind computation, and trains multi-token prediction, too; the plan is of BF16 and of a trainer that hides "
        "none of it. So the hours cannot agree; what can be compared is what the causes take, below.",
    ),
    Run(
        "DeepSeek-V3, long sequences",
        119e3,
        DEEPSEEK,
        "deepseek-v3",
        stages=(2, 3),
        assumed="The same; and the recipe's own way to share sequences among GPUs, which the report does not tell.",
    ),
]


def page() -> str:
    """The whole page, Markdown."""
    return "\n".join([HEAD, *_table(), "", *_assumptions(), *_causes()]) + "\n"


def planned(run: Run) -> list[RunStage]:
    """The stages that are compared, planned."""
    changes = list(run.changes)
    loaded = load_recipe(run.recipe, changes)
    recipe = check_recipe(loaded, need_data=False).recipe
    assert recipe.hardware.gpu is not None
    stages = plan_run(recipe, find_gpu(recipe.hardware.gpu)).stages
    return [stage for stage in stages if not run.stages or stage.number + 1 in run.stages]


def _table() -> Iterator[str]:
    yield "## Hours\n"
    yield "| run | published | plan | error | left for all else | tokens | TFLOP/s a GPU, published | plan |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in RUNS:
        stages = planned(run)
        hours, flops = sum(stage.gpu_hours for stage in stages), sum(stage.flops for stage in stages)
        error = hours / run.hours - 1
        cells = [f"{run.name} ({run.source})", _hours(run.hours), _hours(hours), f"{error:+.0%}"]
        cells += [f"{-error:.0%}" if error < 0 else "nothing", format_count(sum(stage.tokens for stage in stages))]
        cells += [f"{flops / count / 3600 / 1e12:.0f}" for count in (run.hours, hours)]
        yield f"| {' | '.join(cells)} |"
    yield LEFT


def _assumptions() -> Iterator[str]:
    yield "## What is assumed\n"
    for run in RUNS:
        changed = f" with `{'`, `'.join(f'--set {change}' for change in run.changes)}`" if run.changes else ""
        which = f", stage{'s' * (len(run.stages) > 1)} {' and '.join(map(str, run.stages))}" if run.stages else ""
        yield f"- **{run.name}**: `tplaunch plan {run.recipe}`{changed}{which}. {run.assumed}"
    yield ""


def _causes() -> Iterator[str]:
    yield "## Where the plan's hours go\n"
    names = ("compute", "recompute", "tensor", "context", "experts", "pipeline", "data", "optimizer")
    yield f"| run, stage | GPU-hours | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for run in RUNS:
        for stage in planned(run):
            if stage.gpu_hours < 0.005 * run.hours:
                continue
            shares = [f"{seconds / stage.plan.step_seconds:.0%}" for seconds in stage.plan.breakdown]
            where = f"{run.name}{f', {stage.name}' if stage.name else ''}"
            yield f"| {where} | {_hours(stage.gpu_hours)} | {' | '.join(shares)} |"
    yield ""
    yield SHARES


def _hours(count: float) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:,.0f}K"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
