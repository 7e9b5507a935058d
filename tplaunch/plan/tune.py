"""The best topologies for a model on so many GPUs: every legal one is estimated, those that fit are ranked.

Two passes keep it quick. The first sums a step up by formula (`schedule_seconds`, the same as the simulation for equal
stages) and looks at the first and the last pipeline rank only; the best of it are then planned in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any

from tplaunch.check.choices import divisors
from tplaunch.plan import compute, memory
from tplaunch.plan.case import Case
from tplaunch.plan.change import Change
from tplaunch.plan.communication import send_seconds
from tplaunch.plan.estimate import BlockWork, Plan, StageWorks, block_works, dp_exposed, estimate
from tplaunch.plan.recomputation import HEADROOM, Option, cheapest, options
from tplaunch.plan.run import RunPlan
from tplaunch.plan.schedule import Held, Step
from tplaunch.plan.tune_run import Tuned
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.context import pays
from tplaunch.spec.schedules import SCHEDULES
from tplaunch.units import GiB

MICRO_BATCHES = (1, 2, 4, 8, 16)
# As fast as 1f1b, it only holds more.
_NOT_TRIED = ("gpipe",)
VIRTUAL_STAGES = (2, 3, 4, 5, 6, 8)
_KEYS = (
    "topology.tp",
    "topology.cp",
    "topology.cp_kind",
    "topology.pp",
    "topology.dp",
    "topology.ep",
    "topology.expert_tp",
    "topology.zero",
    "topology.schedule",
    "topology.virtual_stages",
    "training.micro_batch_size",
    "training.recompute",
)


@dataclass(frozen=True)
class Choice:
    """A topology that fits.

    Args:
        change: the keys that make it.
        plan: its plan, of a step of the stage that takes longest.
        run: the stages that have it, all of a run without stages.
    """

    change: Change
    plan: Plan
    run: RunPlan

    @property
    def reason(self) -> str:
        """What takes the time that is not compute, largest first."""
        return _losses(self.plan)


@dataclass(frozen=True)
class Neighbour:
    """A topology one step from the best, and why it is not the best.

    Args:
        change: the keys that differ from the best's.
        why: the first thing that it loses on.
    """

    change: Change
    why: str


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Args:
        choices: the best first; empty where nothing fits.
        neighbours: of the best.
        legal: how many topologies can run at all.
        fitting: how many of them fit, by the first pass.
    """

    choices: list[Choice]
    neighbours: list[Neighbour]
    legal: int
    fitting: int


def tune(case: Case, gpus: int, *, node_size: int | None = None, count: int = 10, run: Tuned | None = None) -> Tuning:
    """Rank the topologies of a case's model on `gpus` GPUs by the predicted time of its run, each with the cheapest
    recomputation with which it fits. Of a run of stages those are looked at that are fastest for the longest stage.

    The global batch stays as the recipe has it: it belongs to the training, not to the machine.

    Args:
        case: the recipe and the hardware; the topology is not read.
        node_size: GPUs of a node; default: those of a usual node with this GPU.
        run: the stages of the run that are to have the topology, of which the case is the longest; default: the case
            is all of the run.
    """
    run = run or Tuned(case.recipe, {0: case})
    per_node = min(gpus, node_size or min(case.gpu.node_size, 8))
    blocks: dict[tuple[int | bool, ...], tuple[dict[bool, BlockWork], list[Option]]] = {}
    legal = 0
    ranked: list[tuple[float, int, Change, Case]] = []
    for change in candidates(case, gpus, per_node):
        candidate = change.apply(case)
        if candidate is None or (len(run.cases) > 1 and not run.takes(change)):
            continue
        legal += 1
        parallelism = candidate.recipe.topology
        key = (
            *(parallelism.tp, parallelism.cp, candidate.sequence_parallel, parallelism.ep, parallelism.expert_tp),
            candidate.recipe.training.micro_batch_size,
        )
        if key not in blocks:
            works = block_works(candidate)
            blocks[key] = works, options(candidate, works)
        best = _with_cheapest_recomputation(case, change, *blocks[key])
        if best is not None:
            ranked.append((best[0], len(ranked), *best[1:]))
    ranked.sort(key=lambda item: item[:2])
    choices = []
    for change in _both_kinds([item[2:] for item in ranked[: 3 * count]]):
        if (stages := run.planned(change)) is not None:
            choices.append(Choice(change, stages[run.main].plan, RunPlan(run.recipe, [*stages.values()])))
    choices.sort(key=lambda choice: choice.run.seconds)
    choices = choices[:count]
    neighbours = _neighbours(choices[0], case, gpus) if choices else []
    return Tuning(choices, neighbours, legal, len(ranked))


def _both_kinds(ranked: list[tuple[Change, Case]]) -> Iterator[Change]:
    """The first pass's best, those that share sequences also by the other kind of exchange, which it does not look at:
    memory and time are much alike."""
    for change, candidate in ranked:
        yield change
        if candidate.topology.cp > 1:
            yield Change({**change.values, "topology.cp_kind": "ulysses"})


def _with_cheapest_recomputation(
    case: Case, change: Change, works: dict[bool, BlockWork], found: list[Option]
) -> tuple[float, Change, Case] | None:
    """Seconds of a topology's step by formula, with the first of the options that makes it fit."""
    looks: dict[float, tuple[float, Change, Case]] = {}  # by what the option keeps

    def fits(option: Option) -> bool:
        whole = Change({**change.values, "training.recompute": option.value})
        candidate = whole.apply(case)
        assert candidate is not None, "recomputation breaks no rule"
        seconds = quick_look(candidate, works)
        if seconds is not None:
            looks[option.kept] = seconds, whole, candidate
        return seconds is not None

    best = cheapest(found, fits)
    return None if best is None else looks[best.kept]


def candidates(case: Case, gpus: int, per_node: int) -> Iterator[Change]:
    """Every topology worth a look, nothing made again; `Change.apply` says whether it can run."""
    model, training = case.model, case.recipe.training
    batch = training.global_batch_size
    for tp in divisors(gpus):
        if tp > per_node or model.num_heads % tp:
            continue
        for cp, pp in product(divisors(gpus // tp), divisors(gpus // tp)):
            dp, rest = divmod(gpus, tp * cp * pp)
            if rest or not pays(cp, training.seq_len) or pp > model.num_layers or batch % dp:
                continue
            for micro_batch in MICRO_BATCHES:
                if batch % (dp * micro_batch):
                    continue
                for schedule, virtual in _schedules(pp, model.num_layers, compiled=training.compile):
                    shards_gradients = dp * cp > 1 and not SCHEDULES[schedule].splits_backward
                    zeros = (1, 2, 3) if shards_gradients else (1,)
                    for zero, (ep, expert_tp) in product(zeros, expert_cuts(case, tp, cp, dp)):
                        values = (
                            *(tp, cp, "allgather", pp, dp, ep, expert_tp, zero, schedule, virtual, micro_batch),
                            "none",
                        )
                        more = {
                            "topology.sequence_parallel": tp > 1 and training.seq_len % (tp * cp) == 0,
                            "topology.stage_layers": None,
                            "topology.dp_replicate": 1,
                            "topology.nodes": -(-gpus // per_node),
                            "topology.gpus_per_node": per_node,
                        }
                        chosen = {**dict(zip(_KEYS, values, strict=True)), **more}
                        if cp == case.recipe.topology.cp == 1:  # not worth a word
                            del chosen["topology.cp"], chosen["topology.cp_kind"]
                        if model.moe is None:
                            del chosen["topology.ep"], chosen["topology.expert_tp"]
                        yield Change(chosen)


def expert_cuts(case: Case, tp: int, cp: int, dp: int) -> Iterator[tuple[int, int]]:
    """(ep, expert_tp) of experts on tp x cp x dp ranks: experts whole, or, where no more ranks can have some to
    themselves, cut as dense layers are. Without experts there is one way."""
    moe, ranks = case.model.moe, tp * cp * dp
    if moe is None:
        yield 1, 1
        return
    yield from ((ep, 1) for ep in divisors(gcd(ranks, moe.experts)))
    if tp > 1 and moe.ffn_hidden_size % tp == 0:
        yield gcd(ranks // tp, moe.experts), tp


def _schedules(pp: int, layers: int, *, compiled: bool) -> Iterator[tuple[str, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    for name, schedule in SCHEDULES.items():
        if name in _NOT_TRIED or (compiled and schedule.splits_backward):
            continue
        counts = VIRTUAL_STAGES if schedule.interleaved else (schedule.min_stages,)
        yield from ((name, count) for count in counts if count * pp <= layers)


def quick_look(case: Case, works: dict[bool, BlockWork]) -> float | None:
    """Seconds of a case's step by formula; None where its first or its last pipeline rank does not fit.

    Args:
        works: the work of a block of each kind.
    """
    works_of = StageWorks(case, works)
    pp = case.topology.pp
    ends = [0, pp - 1] if pp > 1 else [0]
    held, in_flight = [Held()] * pp, [0.0] * pp
    for rank in ends:
        stages = case.stages_on(rank)
        in_flight[rank] = passes_in_flight(case, rank)
        activations = in_flight[rank] * sum(works_of(stage)[1].held for stage in stages) / len(stages)
        held[rank] = Held(activations, memory.gradients(case, stages) / len(stages))  # of the first stage that has any
        whole, split = held, [Held()] * pp
        if SCHEDULES[case.schedule].zero_bubble:
            whole, split = split, whole
        step = Step(0.0, [0.0] * pp, whole, split, held, held, in_flight)
        if memory.rank_memory(case, rank, step).total > (1 - HEADROOM) * case.gpu.memory:
            return None
    ranks = {rank: [works_of(stage)[0] for stage in case.stages_on(rank)] for rank in {*ends, pp // 2}}
    slowest = max(ranks.values(), key=lambda works: sum(work.seconds for work in works))
    seconds = schedule_seconds(
        case,
        sum(work.forward for work in slowest),
        sum(work.input_backward for work in slowest),
        sum(work.passes.weight_backward for work in slowest),
    )
    seconds += max(dp_exposed(case, case.stages_on(rank), ranks[rank]) for rank in ends)
    return seconds + compute.optimizer_seconds(case, ends)


def schedule_seconds(case: Case, forward: float, inputs: float, weights: float) -> float:
    """Seconds of a pipelined step whose stages are equal (see tests/plan/test_schedule.py for the sources).

    Args:
        forward, inputs, weights: one microbatch's passes through all stages of a rank.
    """
    p, v, m = case.topology.pp, case.virtual_stages, case.microbatches
    work = m * (forward + inputs + weights)
    if p == 1:
        return work
    hops = 2 * (p - 1) * v * send_seconds(case, 0, 1)
    if case.schedule == "1f1b":
        return work + (p - 1) * (forward + inputs + weights) + hops
    if case.schedule == "interleaved1f1b":
        waits = max(0, (v - 1) * (p - m))  # of rounds that fewer microbatches than ranks do not fill
        return work + (p - 1 + waits) * (forward + inputs + weights) / v + hops
    if case.schedule == "interleavedzerobubble":
        return work + (p - 1) * max(forward + inputs - weights, forward) / v + hops
    return work + (p - 1) * (forward / 2 + abs(inputs - weights)) + hops


def passes_in_flight(case: Case, rank: int) -> float:
    """Microbatches in flight on a pipeline rank, counted once for each of its stages."""
    p, v, m = case.topology.pp, case.virtual_stages, case.microbatches
    if p == 1:
        return 1
    if case.schedule == "1f1b":
        return min(m, p - rank)
    if case.schedule == "interleaved1f1b":
        return min(v * m, 2 * (p - 1 - rank) + (v - 1) * p + 1)
    return min(v * m, v * p + (1 if case.schedule == "dualpipev" else 0))


def _losses(plan: Plan) -> str:
    names = {
        "recompute": "recomputation",
        "tensor_parallel": "tp",
        "context_parallel": "cp",
        "expert_parallel": "ep",
        "pipeline": "pipeline",
        "data_parallel": "dp",
        "optimizer": "optimizer",
    }
    shares = {name: getattr(plan.breakdown, key) / plan.step_seconds for key, name in names.items()}
    told = [f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0.001]
    return ", ".join(told) or "all compute"


def _neighbours(best: Choice, case: Case, gpus: int) -> list[Neighbour]:
    """One knob turned one way, everything else as in the best (or as suits it, where pp changes the schedules)."""
    own = best.change.values
    found = []
    recompute = [option.value for option in options(best.plan.case)]
    for differing, ways in _steps(own, gpus, case.recipe, recompute):
        cases = [Change({**own, **values}).apply(case) for values in ways]
        plans = [estimate(candidate) for candidate in cases if candidate is not None]
        if plans:
            why = _why(min(plans, key=lambda plan: (not plan.fits, plan.step_seconds)), best.plan)
        else:
            why = "cannot run: heads, layers or microbatches do not divide"
        found.append(Neighbour(Change(differing), why))
    return found


def _steps(
    own: Mapping[str, Any], gpus: int, recipe: Recipe, recompute: list[Any]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(what to say, ways to do it) for each knob of the best.

    Args:
        recompute: the values worth having, cheapest first.
    """
    tp, cp, pp, dp = (own.get(f"topology.{axis}", 1) for axis in ("tp", "cp", "pp", "dp"))
    layers, compiled = recipe.model.num_layers, recipe.training.compile
    for new in (tp * 2, tp // 2 if tp % 2 == 0 else 0):
        if new and gpus % (new * cp * pp) == 0:
            split = new > 1 and recipe.training.seq_len % new == 0
            sizes = {"topology.tp": new, "topology.dp": gpus // (new * cp * pp), "topology.sequence_parallel": split}
            yield {"topology.tp": new}, [sizes]
    for new in (cp * 2, cp // 2 if cp % 2 == 0 else 0):
        if new and pays(new, recipe.training.seq_len) and gpus % (tp * new * pp) == 0:
            yield {"topology.cp": new}, [{"topology.cp": new, "topology.dp": gpus // (tp * new * pp)}]
    if cp > 1:
        other = {"allgather": "ulysses", "ulysses": "allgather"}[own["topology.cp_kind"]]
        yield {"topology.cp_kind": other}, [{"topology.cp_kind": other}]
    for new in (pp * 2, pp // 2 if pp % 2 == 0 else 0):
        if new and gpus % (new * tp * cp) == 0:
            sizes = {"topology.pp": new, "topology.dp": gpus // (new * tp * cp)}
            schedules = _schedules(new, layers, compiled=compiled)
            ways = [{**sizes, "topology.schedule": s, "topology.virtual_stages": v} for s, v in schedules]
            yield {"topology.pp": new}, ways
    for key, size in (("topology.ep", own.get("topology.ep")), ("topology.expert_tp", own.get("topology.expert_tp"))):
        for new in (size * 2, size // 2) if size else ():
            if new:
                yield {key: new}, [{key: new}]
    for micro_batch in (own["training.micro_batch_size"] * 2, own["training.micro_batch_size"] // 2):
        if micro_batch:
            values = {"training.micro_batch_size": micro_batch}
            yield values, [values]
    for value in _beside(recompute, own["training.recompute"]):
        yield {"training.recompute": value}, [{"training.recompute": value}]
    for zero in (1, 2, 3):
        if zero != own["topology.zero"] and dp * cp > 1:
            yield {"topology.zero": zero}, [{"topology.zero": zero}]
    for schedule, virtual in _schedules(pp, layers, compiled=compiled):
        values = {"topology.schedule": schedule, "topology.virtual_stages": virtual}
        if any(own[key] != value for key, value in values.items()):
            yield values, [values]


def _beside(values: list[Any], own: Any) -> list[Any]:
    """The values before and after one of a list."""
    place = values.index(own)
    return values[max(0, place - 1) : place] + values[place + 1 : place + 2]


def _why(plan: Plan, best: Plan) -> str:
    used, has = plan.memory[plan.fullest].total / GiB, plan.case.gpu.memory / GiB
    if used > (1 - HEADROOM) * has:
        return f"does not fit{' with room to spare' * plan.fits}: {used:.1f} GiB of {has:.1f}"
    slower = plan.step_seconds / best.step_seconds - 1
    if slower < 0.0005:
        return f"as fast, with {used:.1f} GiB"
    names = {
        "compute": "compute (smaller matmuls)",
        "recompute": "recomputation",
        "tensor_parallel": "tensor-parallel communication",
        "context_parallel": "context-parallel communication",
        "expert_parallel": "exchange of tokens between experts",
        "pipeline": "pipeline waiting",
        "data_parallel": "data-parallel communication",
        "optimizer": "the optimizer",
    }
    more = {name: getattr(plan.breakdown, key) - getattr(best.breakdown, key) for key, name in names.items()}
    worst = max(more, key=lambda name: more[name])
    return f"{slower:.1%} slower: {worst} +{more[worst] / best.step_seconds:.1%} of the step"
