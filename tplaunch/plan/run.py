"""The plan of a whole run: of each of its stages what the steps of each batch size take, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tplaunch.data.documents import with_document_length
from tplaunch.plan.case import Case
from tplaunch.plan.change import with_values
from tplaunch.plan.estimate import REGULATED_FLOPS, Plan, estimate
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.checkpoint import Kept, kept_checkpoints
from tplaunch.spec.course import Course
from tplaunch.spec.gpu import Gpu
from tplaunch.spec.resolve import resolve
from tplaunch.spec.run_stages import alone

_ESTIMATED = 4  # batch sizes of a stage beyond which those between are interpolated


@dataclass(frozen=True)
class RunStage:
    """A stage of a run, or all of a run without stages.

    Args:
        number: from 0.
        name: what the recipe calls it; "" where it does not.
        steps: of the run.
        tokens: of these.
        plan: of a step with the last batch size.
        seconds: of all steps, without checkpoints, validation and faults.
    """

    number: int
    name: str
    steps: range
    tokens: int
    plan: Plan
    seconds: float

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.plan.case.topology.world_size / 3600

    @property
    def flops(self) -> float:
        """Model FLOPs."""
        return self.plan.model_flops_per_token * self.tokens

    @property
    def energy_kwh(self) -> float:
        """Energy of the GPUs alone at their full power: an upper bound for them, without hosts and cooling."""
        return self.gpu_hours * self.plan.case.gpu.power / 1000

    @property
    def title(self) -> str:
        """How it is called in sentences."""
        return f"stage {self.number + 1}{f' ({self.name})' if self.name else ''}"

    def as_dict(self) -> dict[str, Any]:
        """The stage as plain data. Seconds, bytes, FLOPs."""
        case = self.plan.case
        return {
            "stage": self.number + 1,
            "name": self.name,
            "first_step": self.steps.start,
            "last_step": self.steps.stop - 1,
            "steps": len(self.steps),
            "tokens": self.tokens,
            "seq_len": case.recipe.training.seq_len,
            "global_batch_size": case.recipe.training.global_batch_size,
            "topology": self.plan.as_dict()["topology"],
            "step_seconds": self.plan.step_seconds,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "energy_kwh": self.energy_kwh,
            "total_flops": self.flops,
            "memory_bytes": self.plan.memory[self.plan.fullest].total,
            "headroom_bytes": self.plan.headroom,
            "fits": self.plan.fits,
        }


@dataclass(frozen=True)
class RunPlan:
    """What a whole run takes.

    Args:
        recipe: of the run, checked.
        stages: at least one; of what is tuned, some of them.
    """

    recipe: Recipe
    stages: Sequence[RunStage]

    @cached_property
    def course(self) -> Course:
        """Of the run."""
        return Course(self.recipe)

    @property
    def staged(self) -> bool:
        """Whether the recipe has stages."""
        return self.recipe.training.stages is not None

    @property
    def fullest(self) -> RunStage:
        """The stage with the least memory to spare; the first of several."""
        return min(self.stages, key=lambda stage: stage.plan.headroom)

    @property
    def fits(self) -> bool:
        return self.fullest.plan.fits

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without checkpoints, validation and faults."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def total_flops(self) -> float:
        """Model FLOPs."""
        return sum(stage.flops for stage in self.stages)

    @property
    def energy_kwh(self) -> float:
        """See `RunStage.energy_kwh`."""
        return sum(stage.energy_kwh for stage in self.stages)

    @cached_property
    def checkpoints(self) -> Kept:
        """Those that stay."""
        return kept_checkpoints(self.recipe)

    def sums(self) -> dict[str, Any]:
        """What the stages take together, as plain data."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "energy_kwh": self.energy_kwh,
            "total_flops": self.total_flops,
            "total_flops_of_1e25": self.total_flops / REGULATED_FLOPS,
        }

    def totals(self) -> dict[str, Any]:
        """What a whole run takes and leaves, and its stages, as plain data."""
        kept = self.checkpoints
        return {
            **self.sums(),
            "steps": self.course.steps,
            "checkpoints": {"kept": kept.count, "bytes_each": kept.each, "bytes": kept.bytes},
            **({"stages": [stage.as_dict() for stage in self.stages]} if self.staged else {}),
        }

    def as_dict(self) -> dict[str, Any]:
        """The run as plain data, for --json: beside it the plan of a step of its fullest stage."""
        shown = {"stage": self.fullest.number + 1} if self.staged else {}
        return {**shown, **self.fullest.plan.as_dict(), **self.totals(), "fits": self.fits}


def plan_run(recipe: Recipe, gpu: Gpu) -> RunPlan:
    """Plan a whole run, whether it fits or not.

    Args:
        recipe: checked, and resolved (`check.recipe.Checked.recipe`).
    """
    if recipe.training.stages is None:
        return RunPlan(recipe, [run_stage(recipe, 0, Case(recipe, gpu))])
    numbers = range(len(recipe.training.stages))
    return RunPlan(recipe, [run_stage(recipe, number, stage_case(recipe, number, gpu)) for number in numbers])


def stage_case(recipe: Recipe, number: int, gpu: Gpu) -> Case:
    """A stage of a checked recipe as a run of its own, of its last batch size."""
    return Case(resolve(with_document_length(alone(recipe, number))), gpu)


def run_stage(recipe: Recipe, number: int, case: Case) -> RunStage:
    """Plan a stage of a run.

    Args:
        recipe: of the whole run.
        case: the stage's (`stage_case`), or, of a run without stages, the run's.
    """
    course, stages = Course(recipe), recipe.training.stages
    steps, counts = course.stages[number], batch_sizes(course, number)
    plan = estimate(case)
    seconds = _seconds_by_size(plan, [*counts])
    name = (stages[number].name if stages else None) or ""
    tokens = course.batches.tokens(steps.stop - 1) - course.batches.tokens(steps.start - 1)
    return RunStage(number, name, steps, tokens, plan, sum(seconds[size] * count for size, count in counts.items()))


def batch_sizes(course: Course, number: int) -> dict[int, int]:
    """How many steps of each batch size, in samples, a stage has."""
    found: Counter[int] = Counter()
    starts = [*(block.step for block in course.batches.blocks), course.steps]
    for block, (begin, end) in zip(course.batches.blocks, pairwise(starts), strict=True):
        if block.stage == number and begin < course.steps:
            found[block.size] += min(end, course.steps) - begin
    return dict(found)


def _seconds_by_size(plan: Plan, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of a step of each batch size. Of many a few are estimated and the others interpolated: once a pipeline
    is full, each further microbatch takes as long as the one before."""
    ordered = sorted(sizes)
    last, count = len(ordered) - 1, min(len(ordered), _ESTIMATED)
    chosen = sorted({ordered[last * place // max(1, count - 1)] for place in range(count)})
    known = {plan.case.recipe.training.global_batch_size: plan.step_seconds}
    for size in chosen:
        if size not in known:
            changed = with_values(plan.case.recipe, {"training.global_batch_size": size})
            known[size] = estimate(Case(changed, plan.case.gpu)).step_seconds
    found = dict(known)
    for low, high in pairwise(chosen):
        for size in ordered:
            if low < size < high and size not in known:
                found[size] = known[low] + (size - low) / (high - low) * (known[high] - known[low])
    return found


def plan_facts(recipe: Recipe, gpu: Gpu) -> dict[str, Any]:
    """The plan of the step that a recipe has in force, and what the whole run takes, for `plan.json`."""
    return {**estimate(Case(recipe, gpu)).as_dict(), **plan_run(recipe, gpu).totals()}
