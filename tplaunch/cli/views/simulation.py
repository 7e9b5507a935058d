"""A simulation as text for the terminal."""

from __future__ import annotations

from collections import Counter

from typer import style

from tplaunch.cli.views.table import columns
from tplaunch.simulate.rank import RankRecord
from tplaunch.simulate.world import Simulation
from tplaunch.spec.topology import EXPERT_AXES, Coordinates, ExpertCoordinates, Topology
from tplaunch.units import format_bytes, format_count


def report(simulation: Simulation) -> str:
    """What the ranks held and sent, beside what the planner says of them."""
    case = simulation.plan.case
    topology = case.topology
    parts = [
        f"{case.recipe.name}: {topology.sizes} = {topology.world_size:,} ranks, "
        f"one step of {case.microbatches} microbatches of the real trainer, on tensors that hold nothing"
    ]
    if case.model.moe is not None:
        parts.append("routing is taken to be balanced: every expert gets as many tokens")
    rows = []
    for record in simulation.records:
        place = topology.coordinates(record.rank)
        planned = simulation.plan.memory[place.pp].allocated
        sizes = (format_bytes(record.peak), format_bytes(planned), f"{planned / record.peak - 1:+.1%}")
        rows.append(
            [
                str(record.rank),
                " ".join(map(str, topology.place(record.rank).values())),
                format_count(record.parameters),
                *sizes,
            ]
        )
    headings = ["rank", " ".join(topology.axes), "parameters", "peak", "planned", "differs"]
    parts.append(columns("memory, without what CUDA and the allocator add", headings, rows, frozenset()))
    rows = [row for record in simulation.records for row in _traffic(simulation, record)]
    headings = ["rank", "axis", "what", "calls", "bytes", "planned"]
    parts.append(columns("communication", headings, rows, frozenset({1, 2})))
    good = style(f"sends, receives and collectives of {simulation.listened} ranks fit together", fg="green")
    bad = [style(f"ranks do not fit together: {problem}", fg="red") for problem in simulation.problems]
    parts.append("\n".join(bad) or good)
    return "\n\n".join(parts)


def _traffic(simulation: Simulation, record: RankRecord) -> list[list[str]]:
    """Calls and bytes of a rank by axis and kind; planned bytes where the planner counts them."""
    topology = simulation.plan.case.topology
    calls: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for collective in record.collectives:
        key = (axis(topology, collective.group, collective.kind), collective.kind)
        calls[key] += 1
        moved[key] += collective.bytes
    for message in record.messages:
        calls["pp", message.kind] += 1
        moved["pp", message.kind] += message.bytes
    stage = axis(topology, tuple(range(topology.stage_size)))
    planned: Counter[tuple[str, str]] = Counter()
    for traffic in simulation.plan.traffic[topology.coordinates(record.rank).pp]:
        name = {"sp": "tp", "dp": _sharing(topology), "stage": stage}.get(traffic.axis, traffic.axis)
        if name in EXPERT_AXES[:3]:  # by whatever name the same ranks have elsewhere
            name = axis(topology, tuple(topology.group(name, record.rank)), traffic.kind)
        planned[name, traffic.kind] += round(traffic.calls * traffic.bytes)
    return [
        [
            str(record.rank),
            *key,
            str(calls[key]),
            format_bytes(moved[key]),
            format_bytes(planned[key]) if key in planned else "",
        ]
        for key in sorted(calls)
    ]


def axis(topology: Topology, group: tuple[int, ...], kind: str = "") -> str:
    """The axis on which a group's ranks differ; "dp" for dp and cp, else one of the experts', "world" for others. What
    all-to-alls go along is the experts' axis first, but for ranks that share a sequence.

    Args:
        kind: of the collective.
    """
    first, last = group[0], group[-1]
    differing = _differing(topology.coordinates(first), topology.coordinates(last))
    of_experts = _differing(topology.expert_coordinates(first), topology.expert_coordinates(last))
    if kind == "all-to-all" and differing != ["cp"] and of_experts in (["ep"], ["expert_tp"]):
        return of_experts[0]
    if differing == ["cp", "dp"]:
        return "dp"
    for axes in (differing, of_experts if topology.expert_sizes else []):
        if len(axes) == 1:
            return axes[0]
    return "world" if differing else "alone"


def _differing(one: Coordinates | ExpertCoordinates, other: Coordinates | ExpertCoordinates) -> list[str]:
    return [name for name, at, there in zip(one._fields, one, other, strict=True) if at != there]


def _sharing(topology: Topology) -> str:
    """The axis of the ranks that share gradients, dp x cp, as `axis` calls it."""
    return "cp" if topology.dp == 1 and topology.cp > 1 else "dp"
