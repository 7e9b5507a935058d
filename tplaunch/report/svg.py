"""A chart as SVG, to stand in a page: its colours are the page's, its values are there for a script to show."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

from tplaunch.report.charts import Chart, Line, limits, log_ticks, number, ticks
from tplaunch.report.curves import Point, running_medians, thin
from tplaunch.report.story import Mark

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26  # around what is drawn
_ROOM = 800  # width from which checkpoints are shown
_MANY = 150  # points from which a curve is drawn twice: faint as it is, and smoothed


def chart_svg(chart: Chart, marks: Sequence[Mark], width: int, height: int) -> str:
    """Draw a chart.

    Args:
        marks: what happened at which step; drawn where the x-axis is the step, checkpoints where there is room.
        width, height: of the picture, in its own units; the page scales it.
    """
    canvas = _Canvas(chart, width, height)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)} by {chart.x}" '
        f'data-left="{LEFT}" data-right="{width - RIGHT}" data-top="{TOP}" data-bottom="{height - BOTTOM}">'
    ]
    parts += canvas.grid()
    if chart.x == "step":
        parts += canvas.marks(marks)
    for line in sorted(chart.lines, key=lambda line: ("level", "line", "dots").index(line.kind)):
        parts += canvas.curve(line)
    return "".join([*parts, "</svg>"])


class _Canvas:
    """Places of one chart."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.chart, self.width, self.height = chart, width, height
        xs = [x for line in chart.lines for x, _ in line.points]
        self.left, self.right = min(xs), max(xs)
        if self.left == self.right:
            self.left, self.right = self.left - 1, self.right + 1
        self.low, self.high = limits(chart)

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.chart.log:
            share = log10(value / self.low) / log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def grid(self) -> list[str]:
        """Lines and numbers of both axes."""
        parts = []
        for value in log_ticks(self.low, self.high) if self.chart.log else ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
            )
        below = self.height - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{below}" y2="{below}"/>')
        for value in ticks(self.left, self.right, max(3, self.width // 110)):
            x = self.x(value)
            anchor = "end" if x > self.width - RIGHT - 12 else "middle"
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{below + 16}" text-anchor="{anchor}">{number(value)}</text>'
            )
        return parts

    def curve(self, line: Line) -> list[str]:
        columns = self.width - LEFT - RIGHT
        points = thin(line.points, columns)
        colour = f"c{line.colour % 6}"
        if line.kind == "level":
            return [f'<polyline class="level" points="{self._places(points)}"/>']
        if line.kind == "dots":
            few = points if len(points) <= columns // 6 else thin(points, columns // 24)
            dots = "".join(f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2.6"/>' for x, y in few)
            return [f'<g class="dots {colour}" {self._values(line, few)}>{dots}</g>']
        smoothed = self.chart.key == "loss" and len(line.points) >= _MANY
        faint = " faint" if smoothed else ""
        parts = [
            f'<polyline class="curve {colour}{faint}" points="{self._places(points)}" {self._values(line, points)}/>'
        ]
        if smoothed:
            over = thin(self._smoothed(line.points), columns // 2)
            parts.append(f'<polyline class="curve {colour}" points="{self._places(over)}"/>')
        return parts

    def _smoothed(self, points: Sequence[Point]) -> list[Point]:
        medians = running_medians([y for _, y in points], max(5, len(points) // 40))
        return [(x, y) for (x, _), y in zip(points, medians, strict=True)]

    def _places(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def _values(self, line: Line, points: Sequence[Point]) -> str:
        """What the script shows: name, and x and y of each point."""
        xs, ys = (" ".join(f"{value:.6g}" for value in axis) for axis in zip(*points, strict=True))
        return f'data-name="{escape(line.label)}" data-x="{xs}" data-y="{ys}"'

    def marks(self, marks: Sequence[Mark]) -> list[str]:
        """What happened: lines for attempts and faults, signs below for checkpoints, above for the rest. Of those that
        fall on one place, one is drawn, and says how many they are."""
        places: dict[tuple[str, int], list[Mark]] = {}
        for mark in marks:
            shown = mark.kind != "other" and (mark.kind != "checkpoint" or self.width > _ROOM)
            if shown and self.left <= mark.step <= self.right and not _is_first(mark):
                places.setdefault((mark.kind, round(self.x(mark.step) / 3)), []).append(mark)
        parts = []
        for (kind, _), here in places.items():
            x, below = self.x(here[0].step), self.height - BOTTOM
            more = f" (and {len(here) - 1} more here)" if len(here) > 1 else ""
            words = f"<title>{escape(f'step {here[0].step:,.0f}: {here[0].text}{more}')}</title>"
            if kind in ("attempt", "fault"):
                shape = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{below}"/>'
            elif kind == "checkpoint":
                shape = f'<path d="M{x:.1f},{below - 6}l3.5,6h-7z"/>'
            else:
                shape = f'<path d="M{x:.1f},{TOP + 7}l4,-7h-8z"/>'
            parts.append(f'<g class="mark {kind}">{words}{shape}</g>')
        return parts


def _is_first(mark: Mark) -> bool:
    """Whether it is the beginning of the run, which needs no line."""
    return mark.kind == "attempt" and mark.step == 0
