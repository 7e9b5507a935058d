"""The pipeline schedules: one table of what each can run, read by the checks, the planner, `tune` and the trainer.

Microbatch rules are those of `torch.distributed.pipelining` (schedules.py of torch 2.11 to 2.14).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Schedule(NamedTuple):
    """What a schedule needs, and how it places its stages.

    Args:
        name: its name in a recipe (torch's, in lower case).
        min_stages, max_stages: stages of one pipeline rank (virtual stages).
        takes: (microbatches, pp) -> whether it can run that many microbatches of a step.
        rule: the same in words; holds {pp} and {stages}, the number of stages of a V (2 x pp).
        v_shaped: stages go there and back again over the ranks, so that the first rank holds the last stage too.
        zero_bubble: most backward passes run in two halves, for inputs and for weights.
        splits_backward: some backward passes run in two halves, which `torch.compile` and FSDP2's gradient
            sharding do not support.
    """

    name: str
    takes: Callable[[int, int], bool]
    rule: str
    min_stages: int = 1
    max_stages: int = 1
    v_shaped: bool = False
    zero_bubble: bool = False
    splits_backward: bool = False

    @property
    def interleaved(self) -> bool:
        """Whether a rank may hold any number of stages from 2, and microbatches come in rounds."""
        return self.max_stages > 2

    def wrong_stages(self, virtual_stages: int) -> str:
        """Why it cannot run so many stages on a rank; "" when it can."""
        if self.min_stages <= virtual_stages <= self.max_stages:
            return ""
        if self.interleaved:
            return f"{self.name} interleaves at least 2 stages on each rank"
        if self.min_stages == 2:
            return f"{self.name} runs exactly 2 stages on each rank, not {virtual_stages}"
        return f"{self.name} runs 1 stage on each rank, not {virtual_stages}"

    def wants(self, pp: int) -> str:
        """Its microbatch rule in words."""
        return self.rule.format(pp=pp, stages=2 * pp)

    def why_not(self, pp: int, virtual_stages: int, microbatches: int) -> str:
        """Why it cannot run these numbers on pp > 1 ranks; "" when it can."""
        if why := self.wrong_stages(virtual_stages):
            return why
        if not self.takes(microbatches, pp):
            return f"{self.name} on pp = {pp} wants {self.wants(pp)} microbatches, not {microbatches}"
        return ""


def _any(microbatches: int, pp: int) -> bool:
    return microbatches >= 1


def _equal_rounds(microbatches: int, pp: int) -> bool:
    return microbatches % max(1, microbatches // pp) == 0


_MANY = 10**6
_ROUNDS = "equal rounds of at least pp = {pp}"

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", _any, "at least 1"),
        Schedule("1f1b", lambda microbatches, pp: microbatches >= pp, "at least pp = {pp}"),
        Schedule("interleaved1f1b", _equal_rounds, _ROUNDS, min_stages=2, max_stages=_MANY),
        Schedule(
            "interleavedzerobubble",
            _equal_rounds,
            _ROUNDS,
            min_stages=2,
            max_stages=_MANY,
            zero_bubble=True,
            splits_backward=True,
        ),
        Schedule(
            "zbvzerobubble",
            _any,
            "at least 1",
            min_stages=2,
            max_stages=2,
            v_shaped=True,
            zero_bubble=True,
            splits_backward=True,
        ),
        Schedule(
            "dualpipev",
            lambda microbatches, pp: microbatches >= 2 * pp,
            "at least its stages, 2 x pp = {stages}",
            min_stages=2,
            max_stages=2,
            v_shaped=True,
            splits_backward=True,
        ),
    )
}


def stage_rank(stage: int, pp: int, schedule: str) -> int:
    """The pipeline rank that holds a stage: round-robin, or there and back again for V schedules."""
    if SCHEDULES[schedule].v_shaped and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def stages_of(pp_rank: int, pp: int, virtual_stages: int, schedule: str) -> list[int]:
    """Stages that a pipeline rank holds, in order."""
    return [s for s in range(pp * virtual_stages) if stage_rank(s, pp, schedule) == pp_rank]
