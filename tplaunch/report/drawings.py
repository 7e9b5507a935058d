"""Pictures of a plan and a topology as SVG, to stand in a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tplaunch.files import Record
from tplaunch.report.charts import number, ticks
from tplaunch.report.prediction import Figure
from tplaunch.run.records import is_number
from tplaunch.spec.topology import Topology
from tplaunch.units import GiB, format_count

_DRAWN_RANKS = 128  # of a topology; beyond, one replica stands for all
_BAR = 22
_WIDTH = 1080


def bars_svg(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    unit: str,
    *,
    limit: tuple[str, float] | None = None,
    points: Mapping[int, float] | None = None,
) -> str:
    """Stacked bars, a row each, with a legend.

    Args:
        rows: name, and the size of each part.
        limit: a line across all rows, and what it is.
        points: row -> a measurement, drawn as a diamond.
    """
    names = [
        name for name in dict.fromkeys(key for _, parts in rows for key in parts) if any(p.get(name) for _, p in rows)
    ]
    left = 24 + 7 * max(len(name) for name, _ in rows)
    ends = [sum(parts.values()) for _, parts in rows] + ([limit[1]] if limit else []) + list((points or {}).values())
    end = max(ends) * 1.04 or 1.0
    scale = (_WIDTH - left - 60) / end
    top = 22 if limit else 6
    below = top + len(rows) * (_BAR + 8)
    legend, height = _legend(names, left, below + 40, diamond=bool(points))
    parts = [f'<svg class="bars" viewBox="0 0 {_WIDTH} {height}" role="img">']
    for tick in ticks(0, end, 8):
        x = left + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{below}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{below + 15}" text-anchor="middle">{number(tick)} {unit}</text>'
        )
    for i, (name, sizes) in enumerate(rows):
        y, x = top + i * (_BAR + 8), float(left)
        parts.append(f'<text class="label" x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for part, size in sizes.items():
            if size and part in names:
                words = f"<title>{escape(name)}, {escape(part)}: {size:.3g} {unit}</title>"
                kind = names.index(part) % 10
                parts.append(
                    f'<rect class="p{kind}" x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{_BAR}">'
                    f"{words}</rect>"
                )
                x += size * scale
        parts.append(f'<text class="tick" x="{x + 6:.1f}" y="{y + 15}">{sum(sizes.values()):.3g}</text>')
        if points and i in points:
            at = left + points[i] * scale
            words = f"<title>{escape(name)}, measured: {points[i]:.4g} {unit}</title>"
            parts.append(f'<path class="diamond" d="M{at:.1f},{y + 3}l8,8l-8,8l-8,-8z">{words}</path>')
    if limit:
        x = left + limit[1] * scale
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{below}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{top - 9}" text-anchor="end">{escape(limit[0])}</text>')
    return "".join([*parts, *legend, "</svg>"])


def _legend(names: Sequence[str], left: int, top: int, *, diamond: bool) -> tuple[list[str], int]:
    parts, x, y = [], left, top
    for kind, name in enumerate([*names, *(["measured"] if diamond else [])]):
        wide = 36 + int(7 * len(name))
        if x + wide > _WIDTH:
            x, y = left, y + 20
        if kind < len(names):
            parts.append(f'<rect class="p{kind % 10}" x="{x}" y="{y - 9}" width="11" height="11"/>')
        else:
            parts.append(f'<path class="diamond" d="M{x + 6},{y - 10}l6,6l-6,6l-6,-6z"/>')
        parts.append(f'<text class="label" x="{x + 17}" y="{y}">{escape(name)}</text>')
        x += wide
    return parts, y + 10


def memory_svg(plan: Record | None, stages: Sequence[Figure], fullest: float | None) -> str:
    """Memory by pipeline rank: what is planned, part by part, and what was measured; "" where neither is known.

    Args:
        fullest: GiB of the fullest rank, where that alone was measured.
    """
    rows: list[tuple[str, Mapping[str, float]]] = []
    for i, rank in enumerate((plan or {}).get("memory", [])):
        sizes = {
            k.replace("_", " "): v / GiB for k, v in rank.items() if k not in ("total", "allocated") and is_number(v)
        }
        rows.append((f"pp {i}", sizes))
    measured = {i: one.measured for i, one in enumerate(stages) if one.measured is not None}
    if not rows:
        return bars_svg([(f"pp {i}", {"measured": value}) for i, value in measured.items()], "GiB") if measured else ""
    if not measured and fullest is not None and plan is not None:
        totals = [rank["total"] for rank in plan["memory"]]
        measured = {totals.index(max(totals)): fullest}
    limit = (f"{plan['gpu']}: {plan['memory_bytes'] / GiB:.1f} GiB", plan["memory_bytes"] / GiB) if plan else None
    return bars_svg(rows, "GiB", limit=limit, points=measured)


_MEASURED_PARTS = {
    "time/data_s": "data",
    "time/forward_backward_s": "forward and backward",
    "time/gradients_s": "gradients",
    "time/update_s": "update",
    "time/checkpoint_stall_s": "checkpoint stall",
}


def step_svg(plan: Record | None, measured: Mapping[str, float]) -> str:
    """Where the time of a step goes: as planned, and as measured; "" where neither is known.

    Args:
        measured: seconds by metric.
    """
    rows: list[tuple[str, Mapping[str, float]]] = []
    planned = (plan or {}).get("breakdown_seconds")
    if isinstance(planned, dict):
        rows.append(("planned", {k.replace("_", " "): v for k, v in planned.items() if is_number(v)}))
    parts = {words: measured[key] for key, words in _MEASURED_PARTS.items() if key in measured}
    if parts:
        rows.append(("measured", parts))
    elif rows and "step_time_s" in measured:
        rows.append(("measured", {"whole step": measured["step_time_s"]}))
    return bars_svg(rows, "s") if rows and any(sum(sizes.values()) for _, sizes in rows) else ""


def topology_svg(topology: Topology) -> tuple[str, str]:
    """The ranks in their nodes, by pipeline rank.

    Returns:
        The picture, and what it leaves out.
    """
    ranks = range(topology.world_size)
    left_out = ""
    if topology.world_size > _DRAWN_RANKS and topology.dp > 1:
        shown = [rank for rank in ranks if topology.coordinates(rank).dp == 0]
        left_out = f"The first of {topology.dp:,} data-parallel replicas; the others are alike."
    else:
        shown = list(ranks)
    if len(shown) > 4 * _DRAWN_RANKS:
        left_out += f" The first {4 * _DRAWN_RANKS} ranks of {len(shown):,}."
        shown = shown[: 4 * _DRAWN_RANKS]
    nodes: dict[int, list[int]] = {}
    for rank in shown:
        nodes.setdefault(topology.node(rank), []).append(rank)
    axes = [axis for axis in topology.axes if topology.size(axis) > 1] or ["tp"]
    cell, tall = 60, 20 + 12 * len(axes)
    across = min(8, max(len(own) for own in nodes.values()))
    wide = across * (cell + 4) + 16
    per_row = max(1, (_WIDTH + 12) // (wide + 12))
    parts: list[str] = []
    y = 0
    entries = list(nodes.items())
    for start in range(0, len(entries), per_row):
        row = entries[start : start + per_row]
        high = 28 + (tall + 4) * max(-(-len(own) // across) for _, own in row) + 6
        for column, (node, own) in enumerate(row):
            x = column * (wide + 12)
            parts.append(f'<rect class="node" x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{high - 2}" rx="6"/>')
            parts.append(f'<text class="label" x="{x + 10}" y="{y + 18}">node {node}</text>')
            for i, rank in enumerate(own):
                place = topology.place(rank)
                rx, ry = x + 9 + (i % across) * (cell + 4), y + 26 + (i // across) * (tall + 4)
                parts.append(
                    f'<g class="rank r{place["pp"] % 6}">'
                    f'<rect x="{rx}" y="{ry}" width="{cell}" height="{tall}" rx="4"/>'
                    f'<text x="{rx + 7}" y="{ry + 15}" class="number">{rank}</text>'
                )
                parts += [
                    f'<text x="{rx + 7}" y="{ry + 28 + 12 * k}" class="place">{axis} {place[axis]}</text>'
                    for k, axis in enumerate(axes)
                ]
                parts.append("</g>")
        y += high + 10
    return f'<svg class="topology" viewBox="0 0 {_WIDTH} {y}" role="img">{"".join(parts)}</svg>', left_out.strip()


def in_words(topology: Topology, model: Any) -> str:
    """A topology in a sentence, for those who cannot see the picture."""
    from tplaunch.spec.parameters import active_parameter_count, parameter_count

    sizes = " \u00d7 ".join(f"{axis.upper()} {topology.size(axis)}" for axis in topology.axes)
    experts = " \u00d7 ".join(f"{axis.upper()} {topology.size(axis)}" for axis in topology.expert_axes)
    active = f", {format_count(active_parameter_count(model))} of them active" if model.moe else ""
    if experts:
        sizes += f" (experts: {experts})"
    return (
        f"{topology.world_size:,} ranks = {sizes}, on {topology.nodes:,} node{'s' * (topology.nodes != 1)}; "
        f"{format_count(parameter_count(model))} parameters{active}."
    )
