"""What the planner says of a run, kept beside what is measured: `plan.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from tplaunch.files import write_atomic
from tplaunch.plan.run import plan_facts
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.spec.gpu import Gpu, find_gpu

_FIGURES = (
    *("gpu", "fits", "step_seconds", "tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "bubble"),
    "seconds",
)


def write_plan(recipe: Recipe, here: Gpu | None, run_dir: RunDir) -> None:
    """Write the plan of a resolved recipe for the GPU that it names, else for the one that it runs on. Where the table
    has neither, there is no plan, and none of an attempt before is left. Does not raise: a run needs no prediction.

    Args:
        here: this machine's.
    """
    try:
        run_dir.plan.unlink(missing_ok=True)
        gpu = here if recipe.hardware.gpu is None else find_gpu(recipe.hardware.gpu)
        if gpu is not None:
            write_atomic(run_dir.plan, json.dumps(plan_facts(recipe, gpu)))
    except Exception as error:  # a file of a GPU that is gone since the recipe was checked, a full disk
        print(f"there is no {run_dir.plan}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def predictions(run_dir: RunDir) -> dict[str, Any]:
    """The figures of `plan.json` that a run can be held against, and `memory_fullest_bytes` and
    `memory_fullest_allocated_bytes`, of the fullest rank; {} without a plan."""
    try:
        plan = json.loads(run_dir.plan.read_bytes())
        fullest = plan["memory"][plan["fullest_pp_rank"]]
        found = {key: plan[key] for key in _FIGURES}
        memory = {"memory_fullest_bytes": "total", "memory_fullest_allocated_bytes": "allocated"}
        return found | {name: fullest[key] for name, key in memory.items()}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
