"""Runs as a table for the terminal, as wide as it is."""

from __future__ import annotations

from collections.abc import Sequence

from typer import style

from tplaunch.cli.views.table import columns, plain
from tplaunch.report.rows import Row
from tplaunch.units import format_count, format_duration

_COLOURS = {"running": "green", "failed": "red", "gone": "red", "done": "blue", "preempted": "yellow"}
_COLOURS |= {"pending": "yellow", "requeued": "yellow", "stopping": "yellow"}
_HEADINGS = ["run", "from", "state", "step", "loss", "tokens/s", "topology", "age", "why"]
_LEFT = frozenset(("run", "from", "state", "topology", "why"))
_OPTIONAL = ("from", "why")  # columns that are left out where they are empty
_SHORTEST = 12  # characters that a name keeps


def list_text(rows: Sequence[Row], width: int | None) -> str:
    """A table of runs, a line each. What is too long for the width is cut: reasons first, then names.

    Args:
        width: columns of the terminal; None where nobody looks: then nothing is cut, as it may be searched.
    """
    cells = [_cells(row) for row in rows]
    shown = [i for i, name in enumerate(_HEADINGS) if name not in _OPTIONAL or any(row[i] for row in cells)]
    headings, cells = [_HEADINGS[i] for i in shown], [[row[i] for i in shown] for row in cells]
    if width is not None:
        headings, cells = _fit(headings, cells, width)
    return columns("", headings, cells, frozenset(i for i, name in enumerate(headings) if name in _LEFT))


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        row.origin,
        style(row.state, fg=_COLOURS.get(row.state)),
        f"{row.step or 0:,}/{'?' if row.steps is None else format(row.steps, ',')}",
        "" if row.loss is None else f"{row.loss:.4f}" if abs(row.loss) < 1000 else f"{row.loss:.4g}",
        "" if row.tokens_per_s is None else format_count(row.tokens_per_s),
        row.topology,
        "" if row.age is None else format_duration(row.age),
        "" if row.state == "done" else row.why,
    ]


def _fit(headings: list[str], cells: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    widths = [max(len(plain(row[i])) for row in [headings, *cells]) for i in range(len(headings))]
    room = width - sum(widths) - 2 * (len(widths) - 1)
    if headings[-1] == "why":
        left = widths[-1] + room
        if left < 10:  # a word says nothing; without the column the names have more room
            headings, cells, room = headings[:-1], [row[:-1] for row in cells], left + 2
        else:
            cells, room = [[*row[:-1], _cut(row[-1], left)] for row in cells], 0
    if room < 0:
        keep = max(_SHORTEST, widths[0] + room)
        cells = [[_middle(row[0], keep), *row[1:]] for row in cells]
    return headings, cells


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _middle(text: str, length: int) -> str:
    """A text without its middle: names of sweeps differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"
