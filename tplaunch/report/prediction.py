"""What was predicted of a run, beside what it measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tplaunch.errors import TplaunchError
from tplaunch.files import Record
from tplaunch.report.curves import Curves
from tplaunch.run.directory import RunDir, read_recipe
from tplaunch.run.records import is_number
from tplaunch.units import GiB

Unit = Literal["s", "count", "TFLOP/s", "share", "GiB"]


@dataclass(frozen=True)
class Figure:
    """A figure of a run; None: not predicted, or not measured."""

    name: str
    unit: Unit
    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured by predicted."""
        return self.measured / self.predicted if self.predicted and self.measured is not None else None


def read_plan(run: RunDir) -> tuple[Record | None, str]:
    """The plan of a run (`plan.run.plan_facts`): that of its directory, else one made from its recipe.

    Returns:
        The plan, and why there is none.
    """
    try:
        plan = json.loads(run.plan.read_bytes())
        if _is_plan(plan):
            return plan, ""
    except (OSError, ValueError, RecursionError):
        pass
    recipe = read_recipe(run)
    if recipe is None:
        return None, "the recipe cannot be read"
    if recipe.hardware.gpu is None:
        return None, "neither plan.json nor the recipe names the GPU that was planned for"
    from tplaunch.plan.run import plan_facts
    from tplaunch.spec.gpu import find_gpu

    try:
        return plan_facts(recipe, find_gpu(recipe.hardware.gpu)), ""
    except (TplaunchError, ValueError) as error:
        return None, str(error)


def _is_plan(plan: Any) -> bool:
    """Whether a file that anybody may have edited holds what is read of a plan."""
    needed = ("step_seconds", "tokens_per_s", "mfu", "memory_bytes")
    if not isinstance(plan, dict) or not all(is_number(plan.get(key)) for key in needed):
        return False
    ranks = plan.get("memory")
    return (
        isinstance(ranks, list)
        and all(isinstance(rank, dict) and is_number(rank.get("total")) for rank in ranks)
        and isinstance(plan.get("gpu"), str)
    )


def figures(plan: Record | None, curves: Curves, steps: int | None) -> list[Figure]:
    """The figures that are predicted or measured. Measured is the median of records, but for memory, a peak."""
    said = {key: value for key, value in (plan or {}).items() if is_number(value)}
    memory = [_allocated(rank) for rank in (plan or {}).get("memory", [])]
    step_time = curves.typical("step_time_s")
    in_all = None if step_time is None or steps is None else step_time * steps
    found = [
        Figure("step", "s", said.get("step_seconds"), step_time),
        Figure("tokens/s", "count", said.get("tokens_per_s"), curves.typical("tokens_per_s")),
        Figure("TFLOP/s of a GPU", "TFLOP/s", said.get("tflops_per_gpu"), curves.typical("tflops_per_gpu")),
        Figure("MFU", "share", said.get("mfu"), curves.typical("mfu")),
        Figure("memory of the fullest rank", "GiB", max(memory, default=None), curves.peak("memory_peak_gib")),
        Figure("pipeline bubble", "share", said.get("bubble"), None),
        Figure("time of all steps", "s", said.get("seconds"), in_all),
    ]
    return [one for one in found if one.predicted is not None or one.measured is not None]


def memory_by_stage(plan: Record | None, curves: Curves) -> list[Figure]:
    """Memory that torch allocates, by pipeline rank, of the fullest of its ranks."""
    ranks: Sequence[Record] = (plan or {}).get("memory", [])
    measured = [curves.peak(f"memory/pp{rank}_peak_gib") for rank in range(max(len(ranks), _stages(curves)))]
    return [
        Figure(f"pp {i}", "GiB", _allocated(ranks[i]) if i < len(ranks) else None, value)
        for i, value in enumerate(measured)
    ]


def _allocated(rank: Record) -> float:
    """GiB that torch counts as allocated."""
    counted: float = rank["allocated"] if is_number(rank.get("allocated")) else rank["total"]
    return counted / GiB


def _stages(curves: Curves) -> int:
    count = 0
    while curves.last(f"memory/pp{count}_peak_gib") is not None:
        count += 1
    return count


def in_unit(value: float | None, unit: Unit) -> str:
    """A figure as text; "" for none."""
    from tplaunch.units import format_count, format_duration

    if value is None:
        return ""
    match unit:
        case "s":
            return f"{value:.3g} s" if value < 100 else format_duration(value)
        case "count":
            return format_count(value)
        case "TFLOP/s":
            return f"{value:.3g}"
        case "share":
            return f"{value:.1%}"
    return f"{value:.2f} GiB"
