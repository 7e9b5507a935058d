"""A plan as text for the terminal: tables of memory, communication and time, the rank map, the pipeline in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from typer import style

from tplaunch.cli.views.schedule import schedule_lines
from tplaunch.cli.views.table import columns
from tplaunch.cli.views.timeline import timeline_text
from tplaunch.cli.views.whole import flops_in_words, in_all, run_lines, seconds_in_words
from tplaunch.plan.case import Case, Stage
from tplaunch.plan.communication import axis_group
from tplaunch.plan.estimate import Plan
from tplaunch.plan.experts import bytes_by_link, grouped_efficiency
from tplaunch.plan.memory import Memory
from tplaunch.plan.recomputation import part_costs
from tplaunch.plan.remedies import Remedy, remedy_lines
from tplaunch.plan.run import RunPlan
from tplaunch.spec.attention import document_length
from tplaunch.spec.lora import targets, trainable_count
from tplaunch.spec.optimizer import kept_in_words
from tplaunch.spec.parameters import active_parameter_count, parameter_count
from tplaunch.spec.recompute import sets
from tplaunch.units import GiB, format_bytes, format_count

if TYPE_CHECKING:
    from tplaunch.plan.schedule import Timeline

# One colour for each pipeline rank, in turn.
STAGE_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
_MEMORY_COLOURS = (
    ("weights", "blue"),
    ("gathered_weights", "cyan"),
    ("gradients", "green"),
    ("optimizer", "magenta"),
    ("activations", "yellow"),
    ("transient", "red"),
    ("pipeline_buffers", "bright_magenta"),
    ("overhead", "white"),
)
_MAX_ROWS = 16


def plan_text(
    run: RunPlan,
    remedies: list[Remedy],
    *,
    rank: int | None = None,
    timeline: Timeline | None = None,
) -> str:
    """A whole plan: of a run with stages all of them, and in full the one that takes the most memory.

    Args:
        remedies: what would make it fit, where it does not.
        timeline: the pipeline's step, to be drawn.
        rank: also this rank's place, groups, memory and traffic.
    """
    stage, plan, case = run.fullest, run.fullest.plan, run.fullest.plan.case
    busiest = plan.fullest if rank is None else case.topology.coordinates(rank).pp
    alike = case.recipe.topology == run.stages[0].plan.case.recipe.topology  # options for the whole recipe reach it
    parts = [
        _headline(case),
        _memory_table(plan),
        _verdict(plan, remedies, "" if alike else stage.title),
        _recompute_table(plan),
        _traffic_table(plan, busiest),
        *_notes(case),
        _time_table(plan),
        _speed_line(plan),
    ]
    schedule, flops = schedule_lines(run.course), _flops_line(plan)
    if run.staged:
        told = f"Of all stages, {stage.title} takes the most memory:"
        parts = [*run_lines(run), *schedule, "", told, *parts, flops]
    else:
        parts += [in_all(run), f"{flops}, {flops_in_words(run)}", *schedule]
    if timeline is not None:
        parts.append(timeline_text(timeline))
    parts.append(rank_map(case))
    if rank is not None:
        parts.append(_rank_lines(case, rank))
    return "\n".join(parts)


def _headline(case: Case) -> str:
    topology, parallelism, training = case.topology, case.recipe.topology, case.recipe.training
    world = f"{topology.world_size} x {case.gpu.name}"
    nodes = f"{topology.nodes} node{'s' * (topology.nodes > 1)}"
    schedule = f", {parallelism.schedule}" if topology.pp > 1 else ""
    schedule += f" x {parallelism.virtual_stages}" if parallelism.virtual_stages > 1 else ""
    sequence = ", sequence parallel" if case.sequence_parallel else ""
    context = f", cp {topology.cp} ({parallelism.cp_kind})" if topology.cp > 1 else ""
    experts = f"; experts: {topology.expert_sizes}" if topology.expert_sizes else ""
    return (
        f"{style(case.recipe.name, bold=True)}  {world} on {nodes}: tp {topology.tp}{context}, pp {topology.pp}, "
        f"dp {topology.dp}, zero {parallelism.zero}{sequence}{schedule}{experts}\n"
        f"  {training.precision}{kept_in_words(case.recipe)}, seq_len {training.seq_len}, "
        f"micro batch {training.micro_batch_size}, global batch {training.global_batch_size} "
        f"({case.microbatches} microbatches), recompute {recompute_text(case)}"
    )


def recompute_text(case: Case) -> str:
    recompute = case.recipe.training.recompute
    if isinstance(recompute, str):
        return recompute
    if recompute.every is not None:
        return f"every {recompute.every}"
    parts = recompute.again if recompute.save is None else recompute.save
    return f"{'again' if recompute.save is None else 'all but'} {', '.join(parts or ['nothing'])}"


def _transient(memory: Memory) -> float:
    return memory.loss + memory.working + memory.data_parallel_buffers


def _parts(memory: Memory) -> dict[str, float]:
    return {**memory._asdict(), "transient": _transient(memory)}


def gib(count: float) -> str:
    return f"{count / GiB:.1f}"


def shown_ranks(plan: Plan) -> list[int]:
    """The pipeline ranks that a table shows: all, or of many the first, the last, the fullest and some between."""
    pp = len(plan.memory)
    if pp <= _MAX_ROWS:
        return list(range(pp))
    step = -(-pp // (_MAX_ROWS - 2))
    return sorted({*range(0, pp, step), pp - 1, plan.fullest})


def _memory_table(plan: Plan) -> str:
    case, capacity = plan.case, plan.case.gpu.memory
    rows: list[list[str]] = []
    for pp_rank in shown_ranks(plan):
        memory = plan.memory[pp_rank]
        parts = _parts(memory)
        cells = [gib(parts[name]) for name, _ in _MEMORY_COLOURS]
        full = pp_rank == plan.fullest and len(plan.memory) > 1
        over = memory.total > capacity
        total = style(gib(memory.total), fg="red" if over else None, bold=over or full or None)
        rows.append([str(pp_rank), _layers(case.stages_on(pp_rank)), *cells, total, memory_bar(memory, capacity, 24)])
    names = ("weights", "gathered", "grads", "optim", "activ", "working", "pipe", "other")
    coloured = [style(name, fg=colour) for name, (_, colour) in zip(names, _MEMORY_COLOURS, strict=True)]
    headings = ["pp", "layers", *coloured, "total", ""]
    title = f"Memory of a rank at its fullest moment, GiB of {gib(capacity)}"
    return columns(title, headings, rows, frozenset({len(headings) - 1}))


def _layers(stages: Iterable[Stage]) -> str:
    stages = list(stages)
    if len(stages) > 4:
        return f"{sum(len(s.layers) for s in stages)} in {len(stages)}"
    return " ".join(f"{s.layers.start}-{s.layers.stop - 1}" if s.layers else "-" for s in stages)


def memory_bar(memory: Memory, capacity: float, width: int) -> str:
    """A bar whose full width is the GPU's memory; what runs over it is said as a multiple."""
    bar, parts = "", _parts(memory)
    done, drawn = 0.0, 0
    for name, colour in _MEMORY_COLOURS:
        done += parts[name]
        cells = min(round(done / capacity * width), width) - drawn
        bar += style("█" * cells, fg=colour) if cells else ""
        drawn += cells
    if memory.total > capacity:
        return bar + style(f"▶ {memory.total / capacity:.2g}x", fg="red", bold=True)
    return bar + style("·" * (width - drawn), dim=True)


def _verdict(plan: Plan, remedies: list[Remedy], stage: str) -> str:
    memory, capacity = plan.memory[plan.fullest], plan.case.gpu.memory
    pp = f" on pp rank {plan.fullest}" if plan.case.topology.pp > 1 else ""
    if plan.fits:
        share = plan.headroom / capacity
        text = f"fits: {format_bytes(plan.headroom)} to spare ({share:.0%}){pp}"
        tight = "; tight: fragmentation may still run it out of memory" if share < 0.05 else ""
        return style(text + tight, fg="green" if share >= 0.05 else "yellow")
    said = f"does not fit: {format_bytes(memory.total)} of {format_bytes(capacity)}{pp}"
    lines = [style(said, fg="red", bold=True), f"  {_inference(plan)}"]
    lines += [f"  fix: {line}" for line in remedy_lines(plan, remedies, stage)]
    return "\n".join(lines)


def _recompute_table(plan: Plan) -> str:
    """What each part of a block would save and cost if it were made again in the backward pass."""
    now = {
        part for parts in sets(plan.case.recipe.training, plan.case.stages_on(plan.fullest)[0].layers) for part in parts
    }
    rows: list[list[str]] = [
        [
            ", ".join(cost.parts),
            format_bytes(cost.block_bytes),
            format_bytes(cost.rank_bytes),
            seconds_in_words(cost.seconds),
            "made again" if now.issuperset(cost.parts) else "kept",
        ]
        for cost in part_costs(plan)
    ]
    where = f" of pp rank {plan.fullest}" if plan.case.topology.pp > 1 else ""
    title = f"Parts of a block{where}: what each saves by itself if it is made again, and costs a step"
    return columns(title, ["part", "block", "rank", "time", "now"], rows, frozenset({0, 4}))


def _inference(plan: Plan) -> str:
    """What the weights alone take, in the compute dtype: enough for inference?"""
    case = plan.case
    sizes = [sum(case.weights(s) for s in case.stages_on(r)) for r in range(case.topology.pp)]
    share = max(sizes) * case.compute_bytes
    whole = sum(sizes) * case.topology.tp * case.compute_bytes
    fits = "fits" if share < case.gpu.memory else "does not fit"
    return (
        f"for inference alone the {case.recipe.training.precision} weights take {whole / 1e9:.0f} GB, "
        f"{share / 1e9:.1f} GB a GPU: {fits}"
    )


def _traffic_table(plan: Plan, pp_rank: int) -> str:
    traffic = [item for item in plan.traffic[pp_rank] if item.calls]
    if not traffic:
        return "Communication: none, one rank alone"
    where = f" of pp rank {pp_rank}" if plan.case.topology.pp > 1 else ""
    headings = ["axis", "what", "kind", "link", "ranks", "calls", "of", "total", "time", "not hidden"]
    rows: list[list[str]] = [
        [
            item.axis,
            item.what,
            item.kind,
            item.link,
            str(item.ranks),
            f"{item.calls:,.0f}",
            format_bytes(item.bytes),
            format_bytes(item.calls * item.bytes),
            seconds_in_words(item.seconds),
            "see waiting" if item.axis == "pp" else seconds_in_words(item.exposed),
        ]
        for item in traffic
    ]
    return columns(f"Communication{where} in a step", headings, rows, frozenset(range(4)))


def _notes(case: Case) -> Iterator[str]:
    """What a rank has of each sequence and of the experts, and how attention was counted."""
    topology, parallelism, data = case.topology, case.recipe.topology, case.recipe.data
    if topology.cp > 1:
        nodes = axis_group(case, "cp").nodes
        held = case.recipe.training.seq_len // topology.cp
        sent = "heads are exchanged" if parallelism.cp_kind == "ulysses" else "keys and values are gathered"
        where = f"over the network, between {nodes} nodes" if nodes > 1 else "inside a node"
        yield f"context parallel: a rank holds {held:,} tokens of each sequence; {sent} {where}"
    yield from _expert_notes(case)
    if (lora := case.recipe.lora) is not None:
        trained, total = trainable_count(case.model, lora), parameter_count(case.model)
        yield (
            f"adapters: {format_count(trained)} parameters are trained, in rank {lora.rank} beside "
            f"{', '.join(targets(lora))}; the model's {format_count(total)} are frozen"
        )
    if length := document_length(case.recipe):
        why = "" if data.document_length else ": no data are at hand, and data.document_length is not given"
        yield f"attention within documents, which are taken to be {length:,} tokens long{why}"


def _expert_notes(case: Case) -> Iterator[str]:
    """How many experts there are, where they are, what goes to them, and how fast they are."""
    moe, topology = case.model.moe, case.topology
    if moe is None:
        return
    total, active = parameter_count(case.model), active_parameter_count(case.model)
    yield (
        f"parameters: {format_count(total)} in all, of which a token meets {format_count(active)}: "
        f"{moe.top_k} of {moe.experts} experts a layer{', and the shared ones' if moe.shared_ffn_hidden_size else ''}"
    )
    slices = f" 1/{topology.expert_tp} of each of" if topology.expert_tp > 1 else ""
    copies = f"; {topology.edp} ranks hold the same" if topology.edp > 1 else ""
    yield f"experts: a rank holds{slices} {case.local_experts} of a layer's {moe.experts}{copies}"
    if topology.ep > 1:
        size = case.own_tokens * moe.top_k * case.model.hidden_size * case.compute_bytes
        near, far = bytes_by_link(case, size)
        nodes = axis_group(case, "ep").nodes
        links = f"{format_bytes(near)} of it inside the node"
        links += f", {format_bytes(far)} between {nodes} nodes" if nodes > 1 else ""
        yield f"all-to-all: a layer sends {format_bytes(size)} of a rank's rows each way, {links}"
    rows = case.expert_rows / case.local_experts
    even = (
        "tokens go to all experts alike" if case.imbalance == 1 else f"the fullest rank gets {case.imbalance:g} times"
    )
    yield (
        f"grouped matmuls: {rows:,.0f} rows an expert, {grouped_efficiency(case):.0%} as fast as large ones; {even} "
        "(hardware.imbalance)"
    )


def _time_table(plan: Plan) -> str:
    names = {
        "compute": "compute",
        "recompute": "recomputation",
        "tensor_parallel": "tp, not hidden",
        "context_parallel": "cp, not hidden",
        "expert_parallel": "ep, not hidden",
        "pipeline": "pipeline waiting",
        "data_parallel": "dp, not hidden",
        "optimizer": "optimizer",
    }
    rows: list[list[str]] = []
    for key, seconds in plan.breakdown._asdict().items():
        share = seconds / plan.step_seconds
        if seconds:
            rows.append([names[key], seconds_in_words(seconds), f"{share:.1%}", "█" * round(share * 40)])
    return columns(f"Time of a step: {seconds_in_words(plan.step_seconds)}", [""] * 4, rows, frozenset({0, 3}))


def _speed_line(plan: Plan) -> str:
    case = plan.case
    per_gpu = plan.tokens_per_second / case.topology.world_size
    bubble = f", bubble {plan.step.bubble:.1%}" if case.topology.pp > 1 else ""
    return (
        f"{format_count(plan.tokens_per_second)} tokens/s, {per_gpu:,.0f} a GPU, "
        f"{plan.model_flops_per_gpu / 1e12:.0f} TFLOP/s a GPU, MFU {plan.mfu:.1%}, HFU {plan.hfu:.1%}{bubble}"
    )


def _flops_line(plan: Plan) -> str:
    return (
        f"{plan.model_flops_per_token / 1e9:,.1f} GFLOP a token "
        f"({plan.hardware_flops_per_token / 1e9:,.1f} with recomputation)"
    )


def rank_map(case: Case, max_nodes: int = 8) -> str:
    """Ranks by node, each with its place on the axes, coloured by pipeline rank."""
    topology = case.topology
    per_node = topology.ranks_per_node
    count = topology.nodes
    nodes: list[int | None] = list(range(min(count, max_nodes)))
    if count > max_nodes:
        nodes = [*range(max_nodes - 1), None, count - 1]
    last = topology.world_size - 1
    widest = len(f"{last} {_slashed(topology.place(last))}")
    per_line = min(per_node, 8 if 8 * (widest + 2) < 108 else 4)  # a line of 120 columns holds it
    rows: list[list[str]] = []
    for node in nodes:
        if node is None:
            rows.append(["...", *[""] * per_line])
            continue
        ranks = range(node * per_node, min((node + 1) * per_node, topology.world_size))
        for start in range(0, min(len(ranks), 4 * per_line), per_line):
            cells = [f"node {node}" if start == 0 else ""]
            for rank in ranks[start : start + per_line]:
                colour = STAGE_COLOURS[topology.coordinates(rank).pp % len(STAGE_COLOURS)]
                cells.append(style(f"{rank} ", dim=True) + style(_slashed(topology.place(rank)), fg=colour))
            rows.append(cells + [""] * (per_line + 1 - len(cells)))
    title = f"Ranks by node ({per_node} each), as {'/'.join(topology.axes)}"
    return columns(title, [""] * (per_line + 1), rows, frozenset({0}))


def _slashed(place: dict[str, int]) -> str:
    return "/".join(map(str, place.values()))


def _rank_lines(case: Case, rank: int) -> str:
    topology = case.topology
    at = topology.coordinates(rank)
    lines = [f"rank {rank}: {topology.describe(rank)}, node {topology.node(rank)}"]
    lines += [f"  {axis} group: {_ranks(topology.group(axis, rank))}" for axis in topology.axes + topology.expert_axes]
    for stage in case.stages_on(at.pp):
        ends = ", the embedding" * stage.first + ", the head and loss" * stage.last
        blocks = f"layers {stage.layers.start} to {stage.layers.stop - 1}" if stage.layers else "no layers"
        lines.append(f"  stage {stage.index}: {blocks}{ends}")
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"{ranks[0]} alone"
    step = ranks[1] - ranks[0]
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]} ({len(ranks)}, every {step})"
