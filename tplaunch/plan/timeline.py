"""A pipeline's step as a picture (SVG) and as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from html import escape
from math import floor, log10

from tplaunch.plan.case import Case
from tplaunch.plan.communication import send_seconds
from tplaunch.plan.estimate import StageWorks
from tplaunch.plan.schedule import Timeline, simulate
from tplaunch.spec.orders import KIND_NAMES

# Fill of each kind, the later chunks of a rank darker (Okabe and Ito's palette, told apart by the colour-blind).
_FILLS = {"F": "#56b4e9", "B": "#009e73", "I": "#e69f00", "W": "#f0e442"}
_WIDTH = 1600
_LEFT = 60
_TOP = 46
_BOTTOM = 34
# What a picture can still show, and a viewer open: beyond it the step's first microbatches stand for all.
_MAX_ACTIONS = 40_000


def pipeline_timeline(case: Case) -> tuple[Timeline, int]:
    """The step of a case, action by action.

    Returns:
        The timeline, and how many microbatches it shows: all, or as many rounds as make a readable picture.
    """
    works = StageWorks(case)
    costs = [works(stage)[1] for stage in case.stages]
    pp, microbatches = case.topology.pp, case.microbatches
    rounds = max(1, microbatches // pp)
    size, rest = divmod(microbatches, rounds)
    shown = max(2, _MAX_ACTIONS // (2 * size * len(case.stages)))
    if shown < rounds:
        microbatches = shown * size + rest
    timeline = simulate(
        case.schedule if pp > 1 else "1f1b",
        pp,
        case.virtual_stages,
        microbatches,
        costs,
        lambda sender, receiver: send_seconds(case, sender, receiver),
    )
    return timeline, microbatches


def timeline_svg(timeline: Timeline, title: str) -> str:
    """The step as an SVG picture: a row for each pipeline rank, time to the right, numbers of microbatches."""
    ranks, seconds = len(timeline.slots), timeline.step.seconds
    row = 36 if ranks <= 8 else 24 if ranks <= 24 else 14
    height = _TOP + ranks * row + _BOTTOM
    per_second = (_WIDTH - _LEFT - 10) / seconds
    shown = {slot.action.kind for slots in timeline.slots for slot in slots}
    kinds = [kind for kind in KIND_NAMES if kind in shown]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    x = _LEFT
    for kind in kinds:
        parts.append(f'<rect x="{x}" y="26" width="12" height="12" fill="{_FILLS[kind]}" stroke="#555"/>')
        parts.append(f'<text x="{x + 17}" y="36">{KIND_NAMES[kind]}</text>')
        x += 40 + 7 * len(KIND_NAMES[kind])
    parts.append(f'<text x="{x}" y="36">numbers: microbatches; darker: later stages of a rank</text>')
    for rank, slots in enumerate(timeline.slots):
        y = _TOP + rank * row
        label = f"pp {rank}" if row >= 14 else str(rank)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + row / 2 + 4:.1f}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - 10}" height="{row - 2}" fill="#eeeeee"/>')
        stages = sorted({slot.action.stage for slot in slots})
        chunk = {stage: i / max(1, len(stages) - 1) for i, stage in enumerate(stages)}
        for (kind, stage, microbatch), start, end in slots:
            left, width = _LEFT + start * per_second, (end - start) * per_second
            stroke = ' stroke="#ffffff" stroke-width="0.6"' if width > 3 else ""
            fill = _darker(_FILLS[kind], 0.35 * chunk[stage])
            parts.append(f'<rect x="{left:.2f}" y="{y}" width="{width:.2f}" height="{row - 2}" fill="{fill}"{stroke}/>')
            text = str(microbatch)
            if width >= 7 * len(text) + 2:
                ink = "#ffffff" if chunk[stage] > 0.5 else "#000000"
                parts.append(
                    f'<text x="{left + width / 2:.2f}" y="{y + row / 2 + 3:.1f}" text-anchor="middle" '
                    f'font-size="{min(12, row - 4)}" fill="{ink}">{text}</text>'
                )
    y = _TOP + ranks * row
    tick = _tick(seconds)
    for i in range(int(seconds / tick) + 1):
        at = _LEFT + i * tick * per_second
        anchor = "start" if i == 0 else "end" if at > _WIDTH - 30 else "middle"
        parts.append(f'<line x1="{at:.1f}" y1="{y}" x2="{at:.1f}" y2="{y + 5}" stroke="#555"/>')
        parts.append(f'<text x="{at:.1f}" y="{y + 19}" text-anchor="{anchor}">{_time(i * tick)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _darker(colour: str, share: float) -> str:
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c * (1 - share)):02x}" for c in channels)


def _tick(seconds: float) -> float:
    """A round number of seconds, of which five to twelve make the whole."""
    power = 10.0 ** floor(log10(seconds))
    return next(power * part for part in (0.1, 0.2, 0.5, 1.0) if seconds / (power * part) <= 12)


def _time(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


def timeline_trace(timeline: Timeline) -> str:
    """The step in Chrome's trace event format: a thread for each pipeline rank, times in microseconds."""
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"pp rank {rank}"}}
        for rank in range(len(timeline.slots))
    ]
    for rank, slots in enumerate(timeline.slots):
        for (kind, stage, microbatch), start, end in slots:
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "name": f"{KIND_NAMES[kind]} {microbatch}",
                    "cat": kind,
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "args": {"stage": stage, "microbatch": microbatch},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
