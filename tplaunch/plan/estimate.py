"""The plan of a case: memory of each pipeline rank, what it sends, and the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tplaunch.plan import compute, memory
from tplaunch.plan.activations import hidden_bytes, stage_activations
from tplaunch.plan.case import Block, Case, Stage
from tplaunch.plan.communication import (
    BlockTraffic,
    Kind,
    Traffic,
    axis_group,
    block_traffic,
    data_parallel_traffic,
    end_traffic,
    send_seconds,
)
from tplaunch.plan.compute import Passes
from tplaunch.plan.context import context_traffic
from tplaunch.plan.exchange import Exchange, Exchanges
from tplaunch.plan.experts import expert_parts, expert_traffic, grouped_efficiency, shared_parts
from tplaunch.plan.latent import latent_parts, latent_traffic, regions
from tplaunch.plan.memory import Memory
from tplaunch.plan.schedule import StageCost, Step, predict
from tplaunch.plan.working import split_backward_waiting
from tplaunch.spec.flops import model_flops_per_token, repeated_flops_per_token
from tplaunch.spec.lora import trainable_count
from tplaunch.spec.parameters import active_parameter_count, layer_kinds, parameter_count
from tplaunch.spec.recompute import Step as BlockStep
from tplaunch.spec.recompute import block_steps, kept, sets

# Training FLOPs from which the EU's AI Act (article 51) presumes that a general-purpose model carries systemic risk.
REGULATED_FLOPS = 1e25


class StageWork(NamedTuple):
    """Seconds of one microbatch in a stage, by cause.

    Args:
        passes: computation, once.
        recomputed: what is made again in the backward pass, with its communication.
        tensor_parallel, context_parallel, expert_parallel: (forward, backward) seconds of communication that nothing
            hides.
    """

    passes: Passes
    recomputed: float
    tensor_parallel: tuple[float, float]
    context_parallel: tuple[float, float]
    expert_parallel: tuple[float, float]

    @property
    def forward(self) -> float:
        return self.passes.forward + self.tensor_parallel[0] + self.context_parallel[0] + self.expert_parallel[0]

    @property
    def input_backward(self) -> float:
        sent = self.tensor_parallel[1] + self.context_parallel[1] + self.expert_parallel[1]
        return self.passes.input_backward + self.recomputed + sent

    @property
    def seconds(self) -> float:
        return self.forward + self.input_backward + self.passes.weight_backward


class Breakdown(NamedTuple):
    """Where the seconds of a step go, on the pipeline rank that computes longest.

    Args:
        compute: forward and backward passes.
        recompute: what is made again.
        tensor_parallel, context_parallel, expert_parallel, data_parallel: communication that nothing hides.
        pipeline: waiting for other ranks, and for what they send.
        optimizer: norm and clipping of gradients, the update.
    """

    compute: float
    recompute: float
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float
    pipeline: float
    data_parallel: float
    optimizer: float


@dataclass(frozen=True)
class Plan:
    """What a recipe holds, and what a step of it moves and costs.

    Args:
        case: what is planned.
        works: by stage.
        step: the pipeline schedule, simulated.
        memory: by pipeline rank.
        traffic: by pipeline rank.
        breakdown: of the step's seconds.
    """

    case: Case
    works: list[StageWork]
    step: Step
    memory: list[Memory]
    traffic: list[list[Traffic]]
    breakdown: Breakdown

    @property
    def step_seconds(self) -> float:
        return sum(self.breakdown)

    @property
    def tokens_per_second(self) -> float:
        return self.case.tokens_per_step / self.step_seconds

    @cached_property
    def model_flops_per_token(self) -> float:
        return model_flops_per_token(self.case.model, self.case.positions(), self.case.recipe.lora)

    @cached_property
    def hardware_flops_per_token(self) -> float:
        """With what is computed again, attention counted in full as in the model FLOPs (Korthikanti et al. 2022)."""
        model, training = self.case.model, self.case.recipe.training
        again = sum(
            count / model.num_layers * alike * repeated_flops_per_token(model, self.case.positions(), parts, layer)
            for parts, count in sets(training, range(model.num_layers)).items()
            for layer, alike in layer_kinds(model).items()
        )
        return self.model_flops_per_token + again

    @property
    def model_flops_per_gpu(self) -> float:
        """Model FLOP/s of one GPU."""
        return self.model_flops_per_token * self.tokens_per_second / self.case.topology.world_size

    @property
    def mfu(self) -> float:
        """Share of the peak that the model FLOPs take."""
        return self.model_flops_per_gpu / self.case.gpu.peak[self.case.recipe.training.precision]

    @property
    def hfu(self) -> float:
        """As `mfu`, with what is computed again."""
        return self.mfu * self.hardware_flops_per_token / self.model_flops_per_token

    @property
    def fullest(self) -> int:
        """The pipeline rank with the least memory to spare."""
        totals = [rank.total for rank in self.memory]
        return totals.index(max(totals))

    @property
    def headroom(self) -> float:
        """Bytes that the fullest rank has left; negative where it does not fit."""
        return self.case.gpu.memory - self.memory[self.fullest].total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for --json and plan.json. Seconds, bytes, FLOPs."""
        case = self.case
        topology = case.topology
        return {
            "name": case.recipe.name,
            "gpu": case.gpu.name,
            "topology": {
                **{axis: topology.size(axis) for axis in ("tp", "cp", "pp", "dp") if axis in topology.axes},
                "world_size": topology.world_size,
                "nodes": topology.nodes,
                "microbatches": case.microbatches,
                "stage_layers": [len(stage.layers) for stage in case.stages],
            },
            "fits": self.fits,
            "memory_bytes": case.gpu.memory,
            "headroom_bytes": self.headroom,
            "fullest_pp_rank": self.fullest,
            "memory": [{**rank._asdict(), "allocated": rank.allocated, "total": rank.total} for rank in self.memory],
            "in_flight": self.step.in_flight,
            "traffic": [[item._asdict() for item in rank] for rank in self.traffic],
            "step_seconds": self.step_seconds,
            "breakdown_seconds": self.breakdown._asdict(),
            "bubble": self.step.bubble,
            "parameters": parameter_count(case.model),
            "active_parameters": active_parameter_count(case.model),
            "trainable_parameters": trainable_count(case.model, case.recipe.lora),
            **({} if case.model.moe is None else {"experts": self._experts()}),
            "tokens_per_step": case.tokens_per_step,
            "tokens_per_s": self.tokens_per_second,
            "tokens_per_s_per_gpu": self.tokens_per_second / topology.world_size,
            "model_flops_per_token": self.model_flops_per_token,
            "hardware_flops_per_token": self.hardware_flops_per_token,
            "tflops_per_gpu": self.model_flops_per_gpu / 1e12,
            "mfu": self.mfu,
            "hfu": self.hfu,
        }

    def _experts(self) -> dict[str, Any]:
        case, topology = self.case, self.case.topology
        return {
            "ep": topology.ep,
            "expert_tp": topology.expert_tp,
            "edp": topology.edp,
            "on_a_rank": case.local_experts,
            "rows_of_one": case.expert_rows / case.local_experts,
            "matmul_efficiency": grouped_efficiency(case),
            "imbalance": case.imbalance,
        }


class BlockWork(NamedTuple):
    """One microbatch through one block: computation, of it each part's, and the communication of tensor, context and
    expert parallelism. What is made again is not in it."""

    passes: Passes
    parts: dict[str, Passes]
    traffic: BlockTraffic
    latent: Exchanges
    context: Exchanges
    experts: Exchanges

    def again(self, made: Sequence[BlockStep]) -> float:
        """Seconds, with communication, of the steps that run again in the backward pass."""
        seconds = sum(step_work(self.parts, step).forward for step in made) + self.traffic.again_seconds(made)
        return seconds + sum(exchanges.again_seconds(made) for exchanges in (self.latent, self.context, self.experts))

    def attending(self, attention: Passes) -> BlockWork:
        """A block like this one but for its attention."""
        passes = self.passes + attention + self.parts["core_attention"] * -1.0
        return self._replace(passes=passes, parts={**self.parts, "core_attention": attention})


def block_work(case: Case, *, experts: bool = False) -> BlockWork:
    """The work of a block, which depends on tp, cp and its kind, ep and expert_tp, the micro batch and sequence
    parallelism alone.

    Args:
        experts: of a block that has them.
    """
    parts = compute.block_parts(case) | latent_parts(case)
    parts |= expert_parts(case) if experts else {}
    steps = block_steps(case.model, experts=experts)
    passes = inside = sum((step_work(parts, step) for step in steps), Passes(0.0))
    shared, exchanged = shared_parts(case), Exchanges()
    if experts:
        attention = [step for step in steps if step.part in ("qkv", "rotary", "core_attention", "attention_output")]
        works = [*(step_work(parts, step) for step in attention), *shared.values()]
        inside, exchanged = sum(works, Passes(0.0)), expert_traffic(case)
    traffic = block_traffic(
        case, inside.input_backward, inside.weight_backward, regions(case, mlp=not experts or bool(shared))
    )
    context = context_traffic(case, compute.queries(case), parts["attention_output"])
    return BlockWork(passes, parts, traffic, latent_traffic(case), context, exchanged)


def step_work(parts: dict[str, Passes], step: BlockStep) -> Passes:
    """What a step of a block takes: its part, but where several steps are of one part, by what it gives."""
    return parts.get(step.gives[0]) or parts[step.part]


def block_works(case: Case) -> dict[bool, BlockWork]:
    """The work of each kind of block of a case's model, with experts or without."""
    return {experts: block_work(case, experts=experts) for experts in case.kinds}


def made_again(case: Case, block: Block) -> tuple[BlockStep, ...]:
    """The steps of a block that run again in its backward pass, in order."""
    return kept(case.model, block.again, experts=block.experts).made


class StageWorks:
    """Stages' work and activations for a case; equal stages are computed once.

    Args:
        blocks: the work of a block of each kind, where it is known.
    """

    def __init__(self, case: Case, blocks: dict[bool, BlockWork] | None = None) -> None:
        self.case = case
        self.blocks = blocks or block_works(case)
        self._known: dict[Any, tuple[StageWork, StageCost]] = {}

    def __call__(self, stage: Stage) -> tuple[StageWork, StageCost]:
        blocks, positions = self.case.blocks(stage), self.case.positions(stage.layers)
        key = (frozenset(blocks.items()), positions, stage.first, stage.last)
        if key not in self._known:
            attention = compute.attention_core(self.case, positions)
            works = {experts: work.attending(attention) for experts, work in self.blocks.items()}
            self._known[key] = self._work(stage, works, blocks)
        return self._known[key]

    def _work(
        self, stage: Stage, works: dict[bool, BlockWork], blocks: dict[Block, int]
    ) -> tuple[StageWork, StageCost]:
        case = self.case
        passes, again = Passes(0.0), 0.0
        if stage.first:
            passes += compute.embedding(case)
        if stage.last:
            passes += compute.head(case)
        forward, backward = end_traffic(case, stage)
        context, experts = [0.0, 0.0], [0.0, 0.0]
        for block, number in blocks.items():
            work = works[block.experts]
            passes += work.passes * number
            again += number * work.again(made_again(case, block))
            forward += number * work.traffic.forward
            backward += number * (work.traffic.backward + work.traffic.split * case.splits_backward(stage))
            forward += number * work.latent.forward
            backward += number * work.latent.backward
            for total, exchanges in ((context, work.context), (experts, work.experts)):
                total[0] += number * exchanges.forward
                total[1] += number * exchanges.backward
        result = StageWork(passes, again, (forward, backward), (context[0], context[1]), (experts[0], experts[1]))
        held, waiting = stage_activations(case, stage), split_backward_waiting(case, stage)
        gradients = 0.0 if case.flat else memory.gradients(case, [stage])  # flat buffers are always there
        cost = StageCost(result.forward, result.input_backward, passes.weight_backward, held, waiting, gradients)
        return result, cost


def estimate(case: Case) -> Plan:
    """Plan a case, whether it fits or not.

    Raises:
        ValueError: the schedule cannot run with this many microbatches (a checked recipe's can).
    """
    topology = case.topology
    works_of = StageWorks(case)
    works, costs = zip(*(works_of(stage) for stage in case.stages), strict=True)
    schedule = case.schedule if topology.pp > 1 else "1f1b"
    step = predict(
        schedule,
        topology.pp,
        case.virtual_stages,
        case.microbatches,
        costs,
        lambda sender, receiver: send_seconds(case, sender, receiver),
    )
    ranks = range(topology.pp)
    return Plan(
        case,
        list(works),
        step,
        [memory.rank_memory(case, rank, step) for rank in ranks],
        traffic := [rank_traffic(case, rank, list(works), works_of.blocks) for rank in ranks],
        _breakdown(case, list(works), step, traffic),
    )


def rank_traffic(case: Case, pp_rank: int, works: list[StageWork], blocks: dict[bool, BlockWork]) -> list[Traffic]:
    """All communication of a rank of a pipeline rank in one step."""
    stages = case.stages_on(pp_rank)
    mine = [works[stage.index] for stage in stages]
    m, group = case.microbatches, axis_group(case, "tp")
    axis = "sp" if case.sequence_parallel else "tp"
    traffic: list[Traffic] = []
    exposed = means = 0.0
    one = next(iter(blocks.values())).traffic  # calls are alike in all blocks
    counts: dict[Kind, float] = {kind: 0.0 for kind, _, _ in one.calls}
    for stage in stages:
        exposed += m * sum(end_traffic(case, stage))
        for block, n in case.blocks(stage).items():
            per_block, made = blocks[block.experts].traffic, made_again(case, block)
            split = case.splits_backward(stage)
            exposed += m * n * (per_block.forward + per_block.backward + per_block.split * split)
            exposed += m * n * per_block.again_seconds(made)
            for kind, forward, backward in per_block.calls:
                counts[kind] += m * n * (forward + backward)
            for kind, calls in per_block.again(made).items():
                counts[kind] += m * n * calls
            if per_block.split_gathers and split:
                counts["all-gather"] += m * n * per_block.split_gathers
            # Of queries and keys, both ways.
            means += m * n * ((4 if per_block.mean_size else 0) + per_block.means_again(made))
    rows: list[tuple[str, Kind, float, float, float]] = [
        ("activations", kind, count, one.size, one.call_seconds[kind]) for kind, count in counts.items()
    ]
    if means:
        rows.append(("means over heads", "all-reduce", means, one.mean_size, one.mean_seconds))
    everything = sum(count * once for _, _, count, _, once in rows)
    for what, kind, count, size, once in rows:
        seconds = count * once
        share = seconds / everything if everything else 0.0
        traffic.append(Traffic(axis, what, kind, count, size, group.link, group.size, seconds, exposed * share))
    traffic += _exchanges(case, stages, blocks)
    traffic += _sends(case, pp_rank, stages)
    return traffic + _data_parallel(case, stages, mine)


def _exchanges(case: Case, stages: list[Stage], blocks: dict[bool, BlockWork]) -> list[Traffic]:
    """Of latent attention, context and expert parallelism."""
    m = case.microbatches
    found: dict[tuple[str, str, Kind, float], Traffic] = {}

    def add(one: Exchange, calls: float, exposed: float) -> None:
        key = one.axis, one.what, one.kind, one.bytes
        item = found.get(key) or Traffic(
            one.axis, one.what, one.kind, 0.0, one.bytes, one.group.link, one.group.size, 0.0, 0.0
        )
        found[key] = item._replace(
            calls=item.calls + calls, seconds=item.seconds + calls * one.seconds, exposed=item.exposed + exposed
        )

    for stage in stages:
        for block, n in case.blocks(stage).items():
            given = {name for step in made_again(case, block) for name in step.gives}
            work = blocks[block.experts]
            for one in (*work.latent.all, *work.context.all, *work.experts.all):
                more = one.again_calls if one.again in given else 0
                add(one, m * n * (one.forward + one.backward + more), m * n * (sum(one.exposed()) + more * one.seconds))
    return list(found.values())


def _data_parallel(case: Case, stages: list[Stage], works: list[StageWork]) -> list[Traffic]:
    forward = sum(work.forward for work in works)
    backward = sum(work.seconds for work in works) - forward
    return data_parallel_traffic(case, stages, forward=forward, backward=backward)


def dp_exposed(case: Case, stages: list[Stage], works: list[StageWork]) -> float:
    """Seconds of a rank's data-parallel communication that nothing hides."""
    return sum(item.exposed for item in _data_parallel(case, stages, works))


def _sends(case: Case, pp_rank: int, stages: list[Stage]) -> list[Traffic]:
    pp = case.topology.pp
    if pp == 1:
        return []
    here = {stage.index for stage in stages}
    leaving = sum(not s.last and s.index + 1 not in here for s in stages)
    leaving += sum(not s.first and s.index - 1 not in here for s in stages)
    neighbour = pp_rank + 1 if pp_rank + 1 < pp else pp_rank - 1
    calls = leaving * case.microbatches
    seconds = calls * send_seconds(case, pp_rank, neighbour)
    link = axis_group(case, "pp").link
    # How much of it is waited for shows in the simulated schedule only, as part of the pipeline's waiting.
    return [Traffic("pp", "hidden states", "send", calls, hidden_bytes(case), link, 2, seconds, 0.0)]


def _breakdown(case: Case, works: list[StageWork], step: Step, traffic: list[list[Traffic]]) -> Breakdown:
    longest = step.busy.index(max(step.busy))
    mine = [works[stage.index] for stage in case.stages_on(longest)]
    m = case.microbatches
    return Breakdown(
        compute=m * sum(work.passes.total for work in mine),
        recompute=m * sum(work.recomputed for work in mine),
        tensor_parallel=m * sum(sum(work.tensor_parallel) for work in mine),
        context_parallel=m * sum(sum(work.context_parallel) for work in mine),
        expert_parallel=m * sum(sum(work.expert_parallel) for work in mine),
        pipeline=step.seconds - step.busy[longest],
        data_parallel=max(
            sum(item.exposed for item in rank if item.axis in ("dp", "edp", "stage")) for rank in traffic
        ),
        optimizer=compute.optimizer_seconds(case, range(case.topology.pp)),
    )
