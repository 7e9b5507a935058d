"""What the planner has to say when a GPU has run out of memory: what each part was to take, and what would fit."""

from __future__ import annotations

from dataclasses import replace

from tplaunch.errors import TplaunchError
from tplaunch.plan.case import Case
from tplaunch.plan.estimate import Plan, estimate
from tplaunch.plan.remedies import remedies, remedy_lines
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.gpu import Gpu, find_gpu, local_gpu
from tplaunch.units import GiB

MARGIN = 0.05  # by how much less than planned a change must take, where the plan had said that the recipe fits


def memory_account(recipe: Recipe, rank: int) -> list[tuple[str, str]]:
    """Labelled lines on the memory of a rank that had not enough: the plan for the GPU that is here, else for the one
    that the recipe names.

    Args:
        recipe: resolved.

    Returns:
        [] where the table has neither GPU.
    """
    gpu = local_gpu() or _named(recipe)
    if gpu is None:
        return []
    plan = estimate(Case(recipe, gpu))
    return [("plan", line) for line in _expected(plan, rank)] + [("fix", line) for line in _what_would_fit(plan, rank)]


def _named(recipe: Recipe) -> Gpu | None:
    try:
        return find_gpu(recipe.hardware.gpu) if recipe.hardware.gpu else None
    except TplaunchError:  # a file, gone since the recipe was checked
        return None


def _expected(plan: Plan, rank: int) -> list[str]:
    topology, gpu = plan.case.topology, plan.case.gpu
    pp = topology.coordinates(rank).pp
    memory = plan.memory[pp]
    spare = gpu.memory - memory.total
    verdict = f"{-spare / GiB:.1f} more than there is" if spare < 0 else f"which leaves {spare / GiB:.1f}"
    where = f" (pp {pp})" if topology.pp > 1 else ""
    parts = sorted(memory._asdict().items(), key=lambda part: -part[1])
    named = [f"{name.replace('_', ' ')} {size / GiB:.1f}" for name, size in parts if size >= 0.05 * GiB]
    of = f"{memory.total / GiB:.1f} GiB of {gpu.name}'s {gpu.memory / GiB:.1f}"
    lines = [f"rank {rank}{where} was to take {of}, {verdict}", f"in GiB: {', '.join(named)}"]
    if spare >= 0:
        lines.append("it took more than planned, or other processes hold memory of this GPU (nvidia-smi lists them)")
    return lines


def _what_would_fit(plan: Plan, rank: int) -> list[str]:
    """Changes and their prices. Where the plan had said that the recipe fits, what takes clearly less than that."""
    case = plan.case
    if plan.fits:
        planned = plan.memory[case.topology.coordinates(rank).pp].total
        plan = estimate(Case(case.recipe, replace(case.gpu, memory=int((1 - MARGIN) * planned))))
    return remedy_lines(plan, remedies(plan))
