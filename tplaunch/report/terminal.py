"""Curves in the terminal, by plotext (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from math import log10
from typing import Any

from tplaunch.errors import Problem, TplaunchError
from tplaunch.report.charts import Chart, Line, limits, log_ticks, number, ticks
from tplaunch.report.curves import thin

# plotext's names, and the same colours as click has them.
_COLOURS = ("blue+", "orange", "green", "magenta", "red", "cyan")
_ANSI = ("bright_blue", "yellow", "green", "magenta", "red", "cyan")
_SYMBOLS = {"dots": "•", "level": "-"}
_HIGH = 16  # lines of a chart
_TWO = 150  # columns from which two charts stand beside each other


def need(module: str) -> Any:
    """A module of the extra `plots`.

    Raises:
        TplaunchError: it is not installed; one sentence with the line that does it.
    """
    try:
        return import_module(module)
    except ImportError:
        raise TplaunchError(Problem(f"drawing needs {module}: pip install 'tplaunch[plots]'")) from None


def terminal_charts(charts: Sequence[Chart], width: int, *, colour: bool) -> str:
    """Charts as text: below each other, or two in a row where the terminal is wide.

    Args:
        width: columns.
        colour: tell runs apart by colours; else by letters.
    """
    plotext = need("plotext")
    if not hasattr(plotext, "terminal"):
        raise TplaunchError(Problem("drawing needs plotext 6: pip install 'tplaunch[plots]'"))
    plotext.terminal.limit(False, False)  # else no chart is wider than what it takes for the terminal
    columns = 2 if width >= _TWO and len(charts) > 1 else 1
    each = (width - 2 * (columns - 1)) // columns
    drawing = _Drawing(plotext, charts, colour)
    blocks = [drawing.chart(chart, each).split("\n") for chart in charts]
    lines = [drawing.legend(), ""]
    for start in range(0, len(blocks), columns):
        row = blocks[start : start + columns]
        lines += ["  ".join(parts).rstrip() for parts in zip(*row, strict=True)] + [""]
    return "\n".join(lines).strip("\n")


class _Drawing:
    """Draws charts that share a legend."""

    def __init__(self, plotext: Any, charts: Sequence[Chart], colour: bool) -> None:
        self.plotext, self.colour = plotext, colour
        lines = [line for chart in charts for line in chart.lines]
        self.runs = {line.colour: line.label for line in lines if line.kind == "line"}
        self.lettered = not colour and len(self.runs) > 1
        self.kinds = {line.kind for line in lines}

    def chart(self, chart: Chart, width: int) -> str:
        figure = self.plotext.figure
        figure.clear()
        figure.theme("simple")
        figure.plot_size(width, _HIGH)
        figure.title(f"{chart.title} by {chart.x}")
        for line in chart.lines:
            figure.draw(self._signal(figure, line, width, log=chart.log))
        low, high = limits(chart)
        rows, below = figure.ruler("y"), figure.ruler("x")
        height = log10 if chart.log else float  # plotext's own logarithmic axis takes its limits for exponents
        rows.lim(height(low), height(high))
        _tick(rows, log_ticks(low, high) if chart.log else ticks(low, high), height)
        places = [x for line in chart.lines for x, _ in line.points]
        left, right = min(places), max(places)
        if right > left:
            below.lim(left, right)
            _tick(below, ticks(left, right, max(2, width // 14)))
        else:
            _tick(below, [left])
        return str(figure.build().string(not self.colour))

    def _signal(self, figure: Any, line: Line, width: int, *, log: bool) -> Any:
        # Dots in each column would hide the curve behind them.
        apart = max(1, len(line.points) * 8 // width)
        points = line.points[::-apart][::-1] if line.kind == "dots" else thin(line.points, 2 * width)
        marker = self.plotext.marker(self._symbol(line), self._name(line))
        height = log10 if log else float
        signal = figure.signal([x for x, _ in points], [height(y) for _, y in points], marker=marker)
        return signal.lines(line.kind != "dots")

    def _symbol(self, line: Line) -> str:
        if line.kind != "line":
            return _SYMBOLS[line.kind]
        return _letter(line.colour) if self.lettered else "braille"

    def _name(self, line: Line) -> str:
        return "default" if line.kind == "level" or not self.colour else _COLOURS[line.colour % len(_COLOURS)]

    def legend(self) -> str:
        """What the signs of all charts mean, in a line; "" where there is one curve only."""
        from typer import style

        parts = []
        for run, label in self.runs.items():
            sign = _letter(run) if self.lettered else "━━"
            parts.append((style(sign, fg=_ANSI[run % len(_ANSI)]) if self.colour else sign) + f" {label}")
        if "dots" in self.kinds:
            parts.append("• validation")
        if "level" in self.kinds:
            parts.append("- predicted")
        return "   ".join(parts) if len(parts) > 1 else ""


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26)


def _tick(ruler: Any, places: Sequence[float], where: Callable[[float], float] = float) -> None:
    ruler.ticks([where(place) for place in places], [number(place) for place in places])
