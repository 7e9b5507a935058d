"""What a rank sends, over which link, and how long that takes: tensor, sequence, pipeline and data parallelism.
(Context parallelism: `tplaunch.plan.context`.)

Ring collectives over n ranks move (n-1)/n of the data once (all-gather, reduce-scatter) or twice (all-reduce). A group
inside a node uses its fast link. A group across nodes is bound by the network: by the adapters of all its ranks on a
node together, as NCCL's rings use them all. An all-to-all sends what leaves the node over each rank's own adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from tplaunch.plan.case import Case, Stage
from tplaunch.plan.memory import hidden_bytes
from tplaunch.recipe.schema import Part
from tplaunch.spec.parameters import stage_parameters

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
        axis: "tp", "sp" (tensor parallelism with sequence parallelism), "cp", "pp" or "dp" (of dp x cp).
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
    HSDP)."""
    topology = case.topology
    strides = {"tp": (1, topology.tp), "cp": (topology.tp, topology.cp), "dp": (topology.tp, case.shards)}
    strides["replica"] = (topology.tp * case.shards, case.replicas)
    strides["pp"] = (topology.tp * case.sharing, topology.pp)
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


class BlockTraffic(NamedTuple):
    """Tensor-parallel communication of one block for one microbatch, in seconds that are not hidden, with its calls.

    Args:
        forward: in the forward pass, nothing hides it.
        backward: in the backward pass, what the other matmul of a pair does not hide.
        calls: (kind, calls forward, calls backward).
        call_seconds: of one call of each kind.
        size: bytes of one call.
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
    split: float = 0.0
    split_gathers: int = 0
    mean_size: float = 0.0
    mean_seconds: float = 0.0

    def again(self, parts: Iterable[Part]) -> dict[Kind, int]:
        """The calls of parts that are made again in the backward pass, which nothing hides: those by which they enter
        or leave a region."""
        entering: Kind = "all-gather"
        leaving: Kind = "reduce-scatter" if "reduce-scatter" in self.call_seconds else "all-reduce"
        kinds: dict[Part, Kind] = {"qkv": entering, "gate_up": entering, "attention_output": leaving, "down": leaving}
        found = Counter(kinds[part] for part in parts if part in kinds)
        return {kind: count for kind, count in found.items() if kind in self.call_seconds}

    def again_seconds(self, parts: Iterable[Part]) -> float:
        """Seconds of these calls, and of means that are taken again."""
        parts = list(parts)
        calls = sum(count * self.call_seconds[kind] for kind, count in self.again(parts).items())
        return calls + self.means_again(parts) * self.mean_seconds

    def means_again(self, parts: Iterable[Part]) -> int:
        """All-reduces of means that parts which are made again take again."""
        return 2 * sum(part == "rotary" for part in parts) if self.mean_size else 0


def block_traffic(case: Case, input_backward: float, weight_backward: float) -> BlockTraffic:
    """Two regions a block (attention, MLP), each entered and left once.

    Without sequence parallelism one all-reduce leaves a region in the forward pass, and one enters it in the
    backward pass, beside the weight gradient's matmul (Shoeybi et al. 2019). With it, all-gathers enter and
    reduce-scatters leave; backward, the input is gathered again beside the input gradient's matmul (Korthikanti et
    al. 2022, section 4.2.2). What asynchronous tensor parallelism hides beyond that is not counted.

    Args:
        input_backward, weight_backward: seconds of a block's backward halves, of which each region's column-parallel
            layers take about a quarter.
    """
    group = axis_group(case, "tp")
    size = case.tokens * case.model.hidden_size * case.compute_bytes
    if group.size == 1:
        return BlockTraffic(0.0, 0.0, [], {}, 0.0)
    beside_input, beside_weight = input_backward / 4, weight_backward / 4
    mean_size, means = 0.0, 0.0
    if case.model.qk_norm_all_heads:
        mean_size = case.tokens * max(4.0, case.compute_bytes)
        means = collective_seconds(case, group, "all-reduce", mean_size)
    if not case.sequence_parallel:
        reduce = collective_seconds(case, group, "all-reduce", size)
        hidden = max(0.0, reduce - beside_weight)
        split = 2 * (reduce - hidden)
        return BlockTraffic(
            2 * (reduce + means),
            2 * (hidden + means),
            [("all-reduce", 2, 2)],
            {"all-reduce": reduce},
            size,
            split,
            mean_size=mean_size,
            mean_seconds=means,
        )
    gather = collective_seconds(case, group, "all-gather", size)
    scatter = collective_seconds(case, group, "reduce-scatter", size)
    backward = 2 * (gather + max(0.0, gather - beside_input) + max(0.0, scatter - beside_weight))
    calls: list[tuple[Kind, int, int]] = [("all-gather", 2, 4), ("reduce-scatter", 2, 2)]
    seconds: dict[Kind, float] = {"all-gather": gather, "reduce-scatter": scatter}
    split = 2 * (3 * gather + scatter) - backward
    forward, backward = 2 * (gather + scatter + means), backward + 2 * means
    return BlockTraffic(forward, backward, calls, seconds, size, split, 2, mean_size, means)


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


def data_parallel_traffic(case: Case, stages: list[Stage], *, forward: float, backward: float) -> list[Traffic]:
    """Gathering of weights and reduction of gradients of a rank, in one step.

    In flat buffers, once a step: gradients are reduced behind the last microbatch's backward pass, a call for each
    parameter (ZeRO 1) or each block (ZeRO 0), and after it where backward passes run in two halves; weights are
    gathered behind the next step's first forward pass. Under FSDP2, ZeRO 2 reduces each block behind each
    microbatch's backward pass, and gathers as flat buffers do; ZeRO 3 gathers twice for each microbatch.

    Args:
        forward, backward: seconds of one microbatch through all of the rank's stages.
    """
    group, replicas = axis_group(case, "dp"), axis_group(case, "replica")
    m = 1 if case.flat else case.microbatches
    gathered = sum(case.weights(stage) for stage in stages) * case.compute_bytes
    reduced = sum(case.weights(stage) for stage in stages) * case.storage_bytes
    blocks = max(1, sum(len(stage.layers) for stage in stages))
    units = _parameters(case, stages) if case.flat else blocks
    behind = backward if case.undivided_backward else 0.0
    traffic = []

    def add(what: str, kind: Kind, calls: int, size: float, over: Group, hiding: float, units: int) -> None:
        once = collective_seconds(case, over, kind, size) + (units - 1) * _latency(case, over, kind)
        exposed = calls * max(0.0, once - hiding, once / units)
        traffic.append(
            Traffic("dp", what, kind, calls * units, size / units, over.link, over.size, once * calls, exposed)
        )

    if group.size > 1:
        hiding = (forward + backward) / 2 if case.zero == 3 else forward
        add("weights", "all-gather", 2 * m if case.zero == 3 else 1, gathered, group, hiding, units)
        add("gradients", "reduce-scatter", m, reduced, group, behind, units)
    if replicas.size > 1:
        shared = case.flat and group.size > 1  # then gradients are summed over replicas when all are scattered
        hiding, units = (0.0, units) if shared else (behind, blocks)
        add("gradients of replicas", "all-reduce", m, reduced / case.shards, replicas, hiding, units)
    return traffic


def _parameters(case: Case, stages: list[Stage]) -> int:
    """How many parameters a rank's stages have."""
    model = case.model
    return sum(len(stage_parameters(model, stage.layers, first=stage.first, last=stage.last)) for stage in stages)


def _latency(case: Case, group: Group, kind: Kind) -> float:
    return collective_seconds(case, group, kind, 0.0)
