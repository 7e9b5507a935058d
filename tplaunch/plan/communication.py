"""What a rank sends, over which link, and how long that takes: tensor, sequence, pipeline and data parallelism.
(Context parallelism: `tplaunch.plan.context`.)

Ring collectives over n ranks move (n-1)/n of the data once (all-gather, reduce-scatter) or twice (all-reduce). A group
inside a node uses its fast link. A group across nodes is bound by the network: by the adapters of all its ranks on a
node together, as NCCL's rings use them all. An all-to-all sends what leaves the node over each rank's own adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from tplaunch.plan.activations import hidden_bytes
from tplaunch.plan.case import Case, Stage
from tplaunch.plan.muon import hidden, moved_bytes
from tplaunch.spec.recompute import Step

Link = Literal["none", "node", "network"]
Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]


class Group(NamedTuple):
    """Ranks that talk to one another.

    Args:
        size: how many.
        nodes: how many nodes they are on.
    """

    size: int
    nodes: int

    @property
    def link(self) -> Link:
        return "none" if self.size == 1 else "node" if self.nodes == 1 else "network"


class Traffic(NamedTuple):
    """One kind of communication of one rank in one step.

    Args:
        axis: "tp", "sp" (tensor parallelism with sequence parallelism), "cp", "ep", "expert_tp", "pp", "dp" (of
            dp x cp), "edp", or "stage" (all ranks of a pipeline stage).
        what: what is sent and why.
        kind: the collective.
        calls: how often.
        bytes: of one call: the whole tensor's, before or after it is split; of an all-to-all, what one rank holds.
        link: what it goes over.
        ranks: size of the group.
        seconds: of all calls, if nothing else ran.
        exposed: of these, what no computation hides.
    """

    axis: str
    what: str
    kind: Kind
    calls: float
    bytes: float
    link: Link
    ranks: int
    seconds: float
    exposed: float


def axis_group(case: Case, axis: str) -> Group:
    """The group of rank 0 on an axis: "tp", "cp", "pp", "dp" (shards, over dp x cp) or "replica" (copies of a shard,
    HSDP), "stage" (tp x cp x dp); of experts "ep", "expert_tp", "edp" (shards) or "expert replica"."""
    topology = case.topology
    strides = {"tp": (1, topology.tp), "cp": (topology.tp, topology.cp), "dp": (topology.tp, case.shards)}
    strides["replica"] = (topology.tp * case.shards, case.replicas)
    strides["expert_tp"] = (1, topology.expert_tp)
    strides["ep"] = (topology.expert_tp, topology.ep)
    strides["edp"] = (topology.expert_tp * topology.ep, case.expert_shards)
    strides["expert replica"] = (topology.expert_tp * topology.ep * case.expert_shards, case.expert_replicas)
    strides["pp"] = (topology.stage_size, topology.pp)
    strides["stage"] = (1, topology.stage_size)
    stride, size = strides[axis]
    nodes = min(size, (size - 1) * stride // case.fast_domain + 1)
    return Group(size, nodes)


def collective_seconds(case: Case, group: Group, kind: Kind, size: float) -> float:
    """Seconds of one collective on a tensor of `size` bytes."""
    if group.size == 1:
        return 0.0
    gpu = case.gpu
    if kind == "all-to-all":
        return _exchange_seconds(case, group, size)
    if group.nodes == 1:
        bandwidth, latency = gpu.link_bandwidth, gpu.link_latency * (group.size - 1)
    else:
        on_node = group.size / group.nodes
        bandwidth = min(gpu.link_bandwidth, gpu.network_bandwidth * on_node) if on_node > 1 else gpu.network_bandwidth
        latency = gpu.network_latency * (group.nodes - 1) + gpu.link_latency * (on_node - 1)
    times = 2 if kind == "all-reduce" else 1
    share = (group.size - 1) / group.size
    return times * (share * size / (bandwidth * gpu.link_efficiency) + latency)


def _exchange_seconds(case: Case, group: Group, size: float) -> float:
    """An all-to-all of `size` bytes of each rank: what stays on the node and what leaves it go at the same time."""
    gpu, on_node = case.gpu, group.size / group.nodes
    inside = (on_node - 1) / group.size * size / (gpu.link_bandwidth * gpu.link_efficiency)
    outside = (group.size - on_node) / group.size * size / (gpu.network_bandwidth * gpu.link_efficiency)
    latency = gpu.link_latency * (group.size - 1) + (gpu.network_latency if group.nodes > 1 else 0.0)
    return max(inside, outside) + latency


def send_seconds(case: Case, sender: int, receiver: int) -> float:
    """Seconds to send one microbatch's hidden states between neighbouring pipeline ranks."""
    topology, gpu = case.topology, case.gpu
    apart = topology.tp * case.sharing
    same_node = sender * apart // case.fast_domain == receiver * apart // case.fast_domain
    bandwidth, latency = (
        (gpu.link_bandwidth, gpu.link_latency) if same_node else (gpu.network_bandwidth, gpu.network_latency)
    )
    return hidden_bytes(case) / (bandwidth * gpu.link_efficiency) + latency


class Regions(NamedTuple):
    """Where a block's tensor-parallel regions begin and end, by what is computed there (`tplaunch.spec.recompute`).

    Args:
        entered: with what is made of the gathered hidden states.
        left: with what hidden states are summed up of.
    """

    entered: tuple[str, ...]
    left: tuple[str, ...]


class BlockTraffic(NamedTuple):
    """Tensor-parallel communication of one block for one microbatch, in seconds that are not hidden, with its calls.

    Args:
        forward: in the forward pass, nothing hides it.
        backward: in the backward pass, what the other matmul of a pair does not hide.
        calls: (kind, calls forward, calls backward).
        call_seconds: of one call of each kind.
        size: bytes of one call.
        regions: of the block.
        split: seconds that a backward pass in two halves adds: each half's matmuls hide less.
        split_gathers: all-gathers that it adds, as both halves need a row-parallel layer's output gradient whole.
        mean_size, mean_seconds: bytes and seconds of one all-reduce of means over all heads, of which queries and keys
            have one each, both ways; 0: their norms are no such norms.
    """

    forward: float
    backward: float
    calls: list[tuple[Kind, int, int]]
    call_seconds: dict[Kind, float]
    size: float
    regions: Regions
    split: float = 0.0
    split_gathers: int = 0
    mean_size: float = 0.0
    mean_seconds: float = 0.0

    def again(self, made: Iterable[Step]) -> dict[Kind, int]:
        """The calls of steps that are made again in the backward pass, which nothing hides: those by which they enter
        or leave a region."""
        leaving: Kind = "reduce-scatter" if "reduce-scatter" in self.call_seconds else "all-reduce"
        found: Counter[Kind] = Counter()
        for name in (name for step in made for name in step.gives):
            found["all-gather"] += name in self.regions.entered
            found[leaving] += name in self.regions.left
        return {kind: count for kind, count in found.items() if count and kind in self.call_seconds}

    def again_seconds(self, made: Iterable[Step]) -> float:
        """Seconds of these calls, and of means that are taken again."""
        made = list(made)
        calls = sum(count * self.call_seconds[kind] for kind, count in self.again(made).items())
        return calls + self.means_again(made) * self.mean_seconds

    def means_again(self, made: Iterable[Step]) -> int:
        """All-reduces of means that steps which are made again take again."""
        return 2 * sum(step.part == "rotary" for step in made) if self.mean_size else 0


def block_traffic(case: Case, input_backward: float, weight_backward: float, regions: Regions) -> BlockTraffic:
    """Without sequence parallelism one all-reduce leaves a region in the forward pass, and one enters it in the
    backward pass, beside the weight gradient's matmul (Shoeybi et al. 2019). With it, all-gathers enter and
    reduce-scatters leave; backward, the input is gathered again beside the input gradient's matmul (Korthikanti et
    al. 2022, section 4.2.2). What asynchronous tensor parallelism hides beyond that is not counted.

    Args:
        input_backward, weight_backward: seconds of the regions' backward halves, of which their column-parallel layers
            take about half.
    """
    group = axis_group(case, "tp")
    size = case.tokens * case.model.hidden_size * case.compute_bytes
    if group.size == 1:
        return BlockTraffic(0.0, 0.0, [], {}, 0.0, regions)
    entered, left = len(regions.entered), len(regions.left)
    beside_input, beside_weight = input_backward / (2 * left), weight_backward / (2 * left)
    mean_size, means = 0.0, 0.0
    if case.model.qk_norm_all_heads:
        mean_size = case.tokens * max(4.0, case.compute_bytes)
        means = collective_seconds(case, group, "all-reduce", mean_size)
    if not case.sequence_parallel:
        reduce = collective_seconds(case, group, "all-reduce", size)
        hidden = max(0.0, reduce - beside_weight)
        return BlockTraffic(
            left * reduce + 2 * means,
            entered * hidden + 2 * means,
            [("all-reduce", left, entered)],
            {"all-reduce": reduce},
            size,
            regions,
            split=entered * (reduce - hidden),
            mean_size=mean_size,
            mean_seconds=means,
        )
    gather = collective_seconds(case, group, "all-gather", size)
    scatter = collective_seconds(case, group, "reduce-scatter", size)
    backward = left * gather
    backward += entered * (max(0.0, gather - beside_input) + max(0.0, scatter - beside_weight))
    calls: list[tuple[Kind, int, int]] = [("all-gather", entered, left + entered), ("reduce-scatter", left, entered)]
    seconds: dict[Kind, float] = {"all-gather": gather, "reduce-scatter": scatter}
    split = left * 2 * gather + entered * (gather + scatter) - backward
    forward, backward = entered * gather + left * scatter + 2 * means, backward + 2 * means
    return BlockTraffic(forward, backward, calls, seconds, size, regions, split, left, mean_size, means)


def end_traffic(case: Case, stage: Stage) -> tuple[float, float]:
    """Seconds of a stage's tensor-parallel communication outside its blocks, forward and backward: the embedding
    leaves the region, the head enters it."""
    group = axis_group(case, "tp")
    size = case.tokens * case.model.hidden_size * case.compute_bytes
    if case.sequence_parallel:
        gather = collective_seconds(case, group, "all-gather", size)
        scatter = collective_seconds(case, group, "reduce-scatter", size)
        return scatter * stage.first + gather * stage.last, gather * stage.first + scatter * stage.last
    reduce = collective_seconds(case, group, "all-reduce", size)
    return reduce * stage.first, reduce * stage.last


class _Shared(NamedTuple):
    """Weights of a rank that some ranks share.

    Args:
        axis: of these ranks.
        what: they are, as it is said before "weights" and "gradients".
        weights: how many of them are trained.
        frozen: how many are not, and are gathered with them (ZeRO 2 and 3).
        group, replicas: ranks that they are split over, and those that hold copies.
        tensors: how many parameters they are of.
        blocks: how many blocks have some.
    """

    axis: str
    what: str
    weights: int
    frozen: int
    group: Group
    replicas: Group
    tensors: int
    blocks: int


def data_parallel_traffic(case: Case, stages: list[Stage], *, forward: float, backward: float) -> list[Traffic]:
    """Gathering of weights and reduction of gradients of a rank, in one step.

    In flat buffers, once a step: gradients are reduced behind the last microbatch's backward pass, a call for each
    parameter (ZeRO 1) or each block (ZeRO 0), and after it where backward passes run in two halves; weights are
    gathered behind the next step's first forward pass. Under FSDP2, ZeRO 2 reduces each block behind each
    microbatch's backward pass, and gathers as flat buffers do; ZeRO 3 gathers twice for each microbatch. Experts are
    shared by fewer ranks, edp, and go beside the rest, after it: the network is one.

    Args:
        forward, backward: seconds of one microbatch through all of the rank's stages.
    """
    m = 1 if case.flat else case.microbatches
    gathering = (forward + backward) / 2 if case.zero == 3 else forward
    reducing = backward if case.undivided_backward else 0.0
    traffic: list[Traffic] = []

    def add(
        of: _Shared, what: str, kind: Kind, calls: int, size: float, over: Group, hiding: float, units: int
    ) -> None:
        once = collective_seconds(case, over, kind, size) + (units - 1) * _latency(case, over, kind)
        exposed = calls * max(0.0, once - hiding, once / units)
        name = f"{of.what} {what}".strip()
        traffic.append(
            Traffic(of.axis, name, kind, calls * units, size / units, over.link, over.size, once * calls, exposed)
        )

    for of in _shared(case, stages):
        gathered, reduced = (of.weights + of.frozen) * case.compute_bytes, of.weights * case.reduced_bytes
        units = of.tensors if case.flat else of.blocks
        before = {kind: sum(t.seconds / m for t in traffic if t.kind == kind) for kind in get_args(Kind)}
        if of.group.size > 1:
            gathers = 2 * m if case.zero == 3 else 1
            add(
                of,
                "weights",
                "all-gather",
                gathers,
                gathered,
                of.group,
                max(0.0, gathering - before["all-gather"]),
                units,
            )
            add(
                of,
                "gradients",
                "reduce-scatter",
                m,
                reduced,
                of.group,
                max(0.0, reducing - before["reduce-scatter"]),
                units,
            )
        if of.replicas.size > 1:
            late = case.flat and of.group.size > 1  # then gradients are summed over replicas when all are scattered
            hiding, units = (0.0, units) if late else (max(0.0, reducing - before["all-reduce"]), of.blocks)
            size = reduced / of.group.size
            add(of, "gradients of replicas", "all-reduce", m, size, of.replicas, hiding, units)
    return traffic + _muon_traffic(case, stages)


def _muon_traffic(case: Case, stages: list[Stage]) -> list[Traffic]:
    """Gradients of hidden matrices to the ranks that orthogonalise them, and updates back, in rounds of two calls; an
    expert's among the ranks that share it. Bytes are those of the mean rank: what it has of all matrices, or what it
    keeps (with copies that is more)."""
    stage = axis_group(case, "stage")
    if case.recipe.optimizer.name != "muon" or stage.size == 1:
        return []
    of, width = hidden(case, stages), moved_bytes(case)
    if not of.rounds:
        return []
    sharing = case.topology.edp * case.topology.expert_tp
    of_expert = Group(sharing, min(sharing, stage.nodes))
    rows: list[tuple[str, float, float]] = [
        ("gradients of matrices", of.total / stage.size, of.expert_total / stage.size),
        ("updates of matrices", of.weights, of.expert_weights),
    ]
    traffic = []
    for what, shared, experts in rows:
        once = [part * width / of.rounds for part in (shared, experts)]
        seconds = of.rounds * sum(
            collective_seconds(case, group, "all-to-all", size)
            for group, size in zip((stage, of_expert), once, strict=True)
            if size
        )
        traffic.append(
            Traffic("stage", what, "all-to-all", of.rounds, sum(once), stage.link, stage.size, seconds, seconds)
        )
    return traffic


def _shared(case: Case, stages: list[Stage]) -> list[_Shared]:
    shared, experts = map(sum, zip(*map(case.tensors, stages), strict=True))
    groups = axis_group(case, "dp"), axis_group(case, "replica")
    count = sum(case.shared_weights(stage) for stage in stages)
    layers = {stage: case.expert_layers(stage) for stage in stages}
    frozen_experts = sum(layers.values()) * case.block_expert_weights(frozen=True)
    frozen = sum(case.frozen_weights(stage) for stage in stages) - frozen_experts
    blocks = max(1, sum(len(stage.layers) for stage in stages))
    found = [_Shared("dp", "", count, 0 if case.flat else frozen, *groups, shared, blocks)]
    count, frozen = sum(case.expert_weights(stage) for stage in stages), 0 if case.flat else frozen_experts
    if count or frozen:
        groups = axis_group(case, "edp"), axis_group(case, "expert replica")
        blocks = sum(layers.values())
        found.append(_Shared("edp", "experts'", count, frozen, *groups, experts, blocks))
    return found


def _latency(case: Case, group: Group, kind: Kind) -> float:
    return collective_seconds(case, group, kind, 0.0)
