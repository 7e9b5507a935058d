"""What to change in a recipe that does not fit, and what each change costs in speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tplaunch.plan.case import Case
from tplaunch.plan.change import Change
from tplaunch.plan.estimate import Plan, estimate
from tplaunch.plan.recomputation import cheapest_change
from tplaunch.spec.context import pays
from tplaunch.units import GiB


@dataclass(frozen=True)
class Remedy:
    """A change that makes a case fit.

    Args:
        change: what to change.
        plan: the plan then.
        price: share of the tokens/s of each GPU that it costs, against the plan that does not fit; negative: faster.
    """

    change: Change
    plan: Plan
    price: float


def single_changes(case: Case) -> Iterator[Change]:
    """The knobs that trade memory for speed, each turned by itself."""
    training, parallelism, topology = case.recipe.training, case.recipe.topology, case.topology
    if topology.tp > 1 and not parallelism.sequence_parallel:
        yield Change({"topology.sequence_parallel": True})
    for zero in range(parallelism.zero + 1, 4):
        if case.sharing > 1:
            yield Change({"topology.zero": zero})
    fitting = cheapest_change(case)
    if fitting is not None:
        yield fitting
    else:  # with other knobs they may do
        for value in {"none": ("cheap", "full"), "full": ()}.get(str(training.recompute), ("full",)):
            yield Change({"training.recompute": value})
    if training.micro_batch_size > 1:
        yield Change({"training.micro_batch_size": training.micro_batch_size // 2})
        yield Change({"training.micro_batch_size": 1})
    if training.loss_chunk > 512:
        yield Change({"training.loss_chunk": 512})
    per_node = topology.ranks_per_node
    for factor in (2, 4, 8):
        if topology.tp * factor <= per_node and topology.dp % factor == 0:
            yield Change({"topology.tp": topology.tp * factor, "topology.dp": topology.dp // factor})
        if topology.dp % factor == 0:
            yield Change({"topology.pp": topology.pp * factor, "topology.dp": topology.dp // factor})
        if topology.dp % factor == 0 and pays(topology.cp * factor, training.seq_len):
            yield Change({"topology.cp": topology.cp * factor, "topology.dp": topology.dp // factor})
    for factor in (2, 4, 8, 16):
        more = {"topology.nodes": topology.nodes * factor}
        yield Change({**more, "topology.dp": topology.dp * factor})
        yield Change({**more, "topology.pp": topology.pp * factor})
        if pays(topology.cp * factor, training.seq_len):
            yield Change({**more, "topology.cp": topology.cp * factor})


def remedies(plan: Plan, count: int = 3) -> list[Remedy]:
    """The cheapest changes that make a plan fit: of one knob where that is enough, else of two, then three.

    Returns:
        At most `count`, fewest GPUs first, then fastest; among them recomputation, where that is enough. None where
        nothing within reach fits.
    """
    changes = list(single_changes(plan.case))
    found: list[Remedy] = []
    for knobs in (1, 2, 3):
        for combined in combinations(changes, knobs):
            values: dict[str, Any] = {}
            for change in combined:
                values.update(change.values)
            if len(values) < sum(len(change.values) for change in combined):
                continue  # two values for one key
            remedy = _try(plan, Change(values))
            if remedy:
                found.append(remedy)
        if len(found) >= count:
            break
    found.sort(key=lambda r: (r.plan.case.topology.world_size, r.price, len(r.change.values)))
    best, others = found[:count], found[count:]
    recomputing = [remedy for remedy in others if remedy.change.values.keys() == {"training.recompute"}]
    return [*best[: count - 1], *recomputing] if recomputing else best


def remedy_lines(plan: Plan, remedies: list[Remedy], stage: str = "") -> list[str]:
    """One line for each remedy, with its price.

    Args:
        stage: how the stage is called that needs it, where options for the whole recipe do not reach it.
    """
    lines = []
    for remedy in remedies:
        then = remedy.plan
        world, old = then.case.topology.world_size, plan.case.topology.world_size
        gpus = f", on {world} GPUs" if world != old else ""
        price = f"{abs(remedy.price):.0%} {'slower' if remedy.price >= 0 else 'faster'} a GPU"
        used = f"{then.memory[then.fullest].total / GiB:.1f} GiB"
        change = f"in {stage}: {remedy.change}" if stage else remedy.change.options
        lines.append(f"{change}  ({price}{gpus}; {used})")
    return lines or ["none within 16 times the GPUs: use a GPU with more memory, or a smaller model"]


def _try(plan: Plan, change: Change) -> Remedy | None:
    case = change.apply(plan.case)
    if case is None:
        return None
    then = estimate(case)
    if not then.fits:
        return None
    speed = then.tokens_per_second / case.topology.world_size
    before = plan.tokens_per_second / plan.case.topology.world_size
    return Remedy(change, then, 1 - speed / before)
