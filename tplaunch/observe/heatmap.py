"""What each rank measured, as a picture: a row a node, a column a GPU of the node, so that a slow node or stage stands
out. SVG in HTML, which needs no library to draw and shows a rank's figures under the pointer."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tplaunch.spec.topology import AXES

_CELL, _HEIGHT, _LABEL = 60, 18, 250  # pixels
_FONT = 'font-family="sans-serif" font-size="11"'
_COLD, _HOT = (237, 242, 251), (192, 41, 43)
_SPREAD = 0.1  # differences below this share of the largest value stay pale: they are noise
QUANTITIES = {
    "memory_peak_gib": "peak memory, GiB",
    "forward_backward_s": "forward and backward, s a step",
    "data_s": "waiting for data, s a step",
}

Row = Mapping[str, Any]


def heat_maps(rows: Sequence[Row]) -> str:
    """A page with a heat map of each quantity.

    Args:
        rows: of all ranks at one step (`run.ranks`), in rank order.
    """
    nodes: dict[int, list[Row]] = {}
    for row in rows:
        nodes.setdefault(row["node"], []).append(row)
    grid = list(nodes.values())
    pictures = [_picture(grid, key, title) for key, title in QUANTITIES.items()]
    return f"<html><body>{''.join(pictures)}</body></html>"


def _picture(grid: list[list[Row]], key: str, title: str) -> str:
    values = [float(row[key]) for line in grid for row in line]
    low, high = min(values), max(values)
    width = _LABEL + _CELL * max(map(len, grid))
    height = _HEIGHT * (len(grid) + 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {_FONT}>'
        f'<text x="0" y="{_HEIGHT - 5}" font-weight="bold">{title}: {low:.4g} to {high:.4g}</text>'
        f"{''.join(_header(grid))}{''.join(_cells(grid, key, low, high))}</svg>"
    )


def _header(grid: list[list[Row]]) -> Iterator[str]:
    """What the ranks of each column share."""
    for column in range(max(map(len, grid))):
        shared = _place([line[column] for line in grid if column < len(line)], ranges=False)
        yield f'<text x="{_LABEL + _CELL * column + 2}" y="{2 * _HEIGHT - 5}" font-size="9">{shared}</text>'


def _cells(grid: list[list[Row]], key: str, low: float, high: float) -> Iterator[str]:
    for number, line in enumerate(grid):
        y = _HEIGHT * (number + 2)
        name = html.escape(f"node {line[0]['node']} {line[0]['host']}"[:24])
        yield f'<text x="0" y="{y + 13}">{name}: {_place(line)}</text>'
        for column, row in enumerate(line):
            value, x = float(row[key]), _LABEL + _CELL * column
            heat = (value - low) / max(high - low, _SPREAD * abs(high)) if high > low else 0.0
            red, green, blue = (round(a + heat * (b - a)) for a, b in zip(_COLD, _HOT, strict=True))
            ink = "white" if heat > 0.6 else "black"
            yield (
                f"<g><title>rank {row['rank']}: {_place([row])}: {value:.4g}</title>"
                f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_HEIGHT - 2}" fill="rgb({red},{green},{blue})"/>'
                f'<text x="{x + 4}" y="{y + 13}" fill="{ink}">{value:.3g}</text></g>'
            )


def _place(rows: Sequence[Row], *, ranges: bool = True) -> str:
    """Coordinates of ranks, as "tp 0-1 pp 3"; without `ranges`, only those that all share."""
    words = []
    for axis in (axis for axis in AXES if axis in rows[0]):
        low, high = min(row[axis] for row in rows), max(row[axis] for row in rows)
        if low == high:
            words.append(f"{axis} {low}")
        elif ranges:
            words.append(f"{axis} {low}-{high}")
    return " ".join(words)
