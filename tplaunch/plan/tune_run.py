"""What a topology makes of the stages of a run that have it: those before the first that names one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

from tplaunch.check.rules import can_run
from tplaunch.plan.case import Case
from tplaunch.plan.change import Change, with_values
from tplaunch.plan.recomputation import HEADROOM
from tplaunch.plan.run import RunStage, batch_sizes, run_stage, stage_case
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course
from tplaunch.spec.gpu import Gpu


@dataclass(frozen=True)
class Tuned:
    """The stages of a run that a topology is found for.

    Args:
        recipe: of the whole run, checked.
        cases: of each stage, by number; of a run without stages, the run's as 0.
        main: the stage that takes most GPU-hours as the recipe has it.
        settled: stages with a micro batch of their own, which stays.
    """

    recipe: Recipe
    cases: Mapping[int, Case]
    main: int = 0
    settled: frozenset[int] = frozenset()

    def takes(self, change: Change) -> bool:
        """Whether all of the stages can run so."""
        return self._changed(change) is not None

    def planned(self, change: Change) -> dict[int, RunStage] | None:
        """The stages with a topology; None where one of them cannot run so, or does not fit with room to spare."""
        found = {}
        for number, case in (self._changed(change) or {}).items():
            found[number] = stage = run_stage(self.recipe, number, case)
            if stage.plan.headroom < HEADROOM * case.gpu.memory:
                return None
        return found or None

    def _changed(self, change: Change) -> dict[int, Case] | None:
        found = {}
        for number, case in self.cases.items():
            values = dict(change.values)
            if number in self.settled:
                values.pop("training.micro_batch_size", None)
            candidate = Change(values).apply(case)
            if candidate is None or not all(can_run(recipe) for recipe in self._sizes(number, candidate.recipe)):
                return None
            found[number] = candidate
        return found

    def _sizes(self, number: int, recipe: Recipe) -> Iterator[Recipe]:
        """A stage with each of its other batch sizes; a run without stages is checked with all of them."""
        if self.recipe.training.stages is not None:
            for size in batch_sizes(Course(self.recipe), number):
                if size != recipe.training.global_batch_size:
                    yield with_values(recipe, {"training.global_batch_size": size})


def tuned_stages(loaded: Recipe, recipe: Recipe, gpu: Gpu) -> Tuned | None:
    """The stages of a run that have its first topology; None where the first stage names one of its own.

    Args:
        loaded: the recipe as it was said.
        recipe: the same, checked.
    """
    stages = loaded.training.stages
    if stages is None:
        return Tuned(recipe, {0: Case(recipe, gpu)})
    count = len([*takewhile(lambda stage: stage.topology is None, stages)])
    if not count:
        return None
    cases = {number: stage_case(recipe, number, gpu) for number in range(count)}
    main = max(cases, key=lambda number: run_stage(recipe, number, cases[number]).gpu_hours)
    settled = frozenset(number for number, stage in enumerate(stages) if stage.micro_batch_size is not None)
    return Tuned(recipe, cases, main, settled)
