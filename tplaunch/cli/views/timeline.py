"""A pipeline's step, drawn in characters."""

from __future__ import annotations

from typer import style

from tplaunch.plan.schedule import Timeline
from tplaunch.spec.orders import KIND_NAMES

KIND_COLOURS = {"F": "blue", "B": "green", "I": "cyan", "W": "yellow"}


def timeline_text(timeline: Timeline, width: int = 96) -> str:
    """The pipeline in time, one row a rank: a character is 1/width of the step and shows the last digit of the
    microbatch that takes most of it; forward, backward (input half, weight half) in their colours."""
    text = "Pipeline: "
    kinds = {slot.action.kind for slots in timeline.slots for slot in slots}
    for kind, name in KIND_NAMES.items():
        if kind in kinds:
            text += style(f" {name} ", fg="black", bg=KIND_COLOURS[kind])
    cell = timeline.step.seconds / width
    for rank, slots in enumerate(timeline.slots):
        text += f"\n{rank:>3} "
        owners: list[tuple[str, int] | None] = [None] * width
        shares = [0.0] * width
        for (kind, _, microbatch), start, end in slots:
            for column in range(int(start / cell), min(width, int(end / cell) + 1)):
                share = min(end, (column + 1) * cell) - max(start, column * cell)
                if share > shares[column]:
                    shares[column], owners[column] = share, (kind, microbatch)
        for owner in owners:
            if owner is None:
                text += style("·", dim=True)
            else:
                text += style(str(owner[1] % 10), fg="black", bg=KIND_COLOURS[owner[0]])
    return text
