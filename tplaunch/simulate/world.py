"""Runs some ranks of a world, each on its own, and checks that what they send to each other matches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tplaunch.plan.case import Case
from tplaunch.plan.estimate import Plan, estimate
from tplaunch.simulate.agree import deadlock, differing_collective
from tplaunch.simulate.pool import processes
from tplaunch.simulate.rank import RankRecord, pipeline_messages, simulate_rank
from tplaunch.spec.topology import Topology


@dataclass(frozen=True)
class Simulation:
    """What the ranks did.

    Args:
        plan: the planner's answer for the simulated step.
        records: of the ranks asked for.
        problems: where ranks do not fit together; empty when all do.
        listened: how many ranks took part in that.
    """

    plan: Plan
    records: list[RankRecord]
    problems: list[str]
    listened: int


def shortened(case: Case) -> Case:
    """The same step cut to 2 microbatches (2 per pipeline rank): later ones repeat the pattern."""
    few = min(case.microbatches, 2 * case.topology.pp)
    training = case.recipe.training.model_copy(
        update={"global_batch_size": few * case.recipe.training.micro_batch_size * case.topology.dp, "compile": False}
    )
    return replace(case, recipe=case.recipe.model_copy(update={"training": training}))


def ends_and_middle(topology: Topology) -> list[int]:
    """The first rank of the first, the middle and the last pipeline rank."""
    return sorted({topology.rank(pp=pp) for pp in (0, topology.pp // 2, topology.pp - 1)})


def simulate(case: Case, ranks: list[int]) -> Simulation:
    """Run the trainer of each rank alone, for one step on tensors that hold nothing.

    The messages of all ranks of their pipelines are then delivered to each other, and the collectives of the first
    rank are held against those of ranks that differ from it in tp, in cp and in dp.
    """
    topology, recipe = case.topology, case.recipe
    twins = [twin for twin in _twins(topology, ranks[0]) if twin not in ranks]
    pipelines = {tuple(topology.group("pp", rank)) for rank in ranks if topology.pp > 1}
    speakers = [rank for pipeline in sorted(pipelines) for rank in pipeline]
    with processes() as run:
        records = list(run(simulate_rank, [(recipe, rank) for rank in [*ranks, *twins]]))
        messages = dict(zip(speakers, run(pipeline_messages, [(recipe, r) for r in speakers]), strict=True))
    first, *others = records
    found = [deadlock({rank: messages[rank] for rank in pipeline}) for pipeline in sorted(pipelines)]
    found += [differing_collective(first.rank, first.collectives, o.rank, o.collectives) for o in others]
    problems = [problem for problem in found if problem]
    return Simulation(estimate(case), records[: len(ranks)], problems, len({*speakers, *ranks, *twins}))


def _twins(topology: Topology, rank: int) -> list[int]:
    """Ranks that differ from one in tp only, in cp only, and in dp only."""
    place = topology.coordinates(rank)._asdict()
    return [
        topology.rank(**{**place, axis: (place[axis] + 1) % topology.size(axis)})
        for axis in ("tp", "cp", "dp")
        if topology.size(axis) > 1
    ]
