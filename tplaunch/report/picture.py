"""Curves as a PNG or SVG picture, by matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tplaunch.errors import Problem, TplaunchError
from tplaunch.report.charts import Chart, limits, log_ticks, number, ticks
from tplaunch.report.curves import thin
from tplaunch.report.palette import LIGHT
from tplaunch.report.terminal import need

_PIXELS = 1200  # columns of a chart that are told apart, at most


def write_picture(charts: Sequence[Chart], path: Path) -> None:
    """Draw charts into a file, two in a row.

    Args:
        path: its ending says the kind: .png, .svg or .pdf.

    Raises:
        TplaunchError: it cannot be written, or not by this ending.
    """
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.4 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    several = len({line.label for chart in charts for line in chart.lines}) > 1
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, chart in zip(grid, charts, strict=False):
        _draw(axes, chart)
    for axes in grid[len(charts) :]:
        axes.axis("off")
    if several:
        seen: dict[str, Any] = {}
        for axes in grid:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                seen.setdefault(label, handle)
        figure.legend(seen.values(), seen.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise TplaunchError(Problem(f"cannot write {path}", why=str(error), key="--output")) from None


def _draw(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        points = thin(line.points, _PIXELS)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        colour = LIGHT.run(line.colour)
        if line.kind == "dots":
            axes.plot(xs, ys, "o", color=colour, markersize=3.5, markeredgecolor="white", label=line.label)
        elif line.kind == "level":
            axes.plot(xs, ys, "--", color=LIGHT.muted, linewidth=1, label=line.label)
        else:
            axes.plot(xs, ys, color=colour, linewidth=1.1, label=line.label)
    axes.set_title(f"{chart.title} by {chart.x}", fontsize=11, loc="left")
    low, high = limits(chart)
    if chart.log:
        axes.set_yscale("log")
    places = log_ticks(low, high) if chart.log else ticks(low, high)
    axes.set_ylim(low, high)
    axes.set_yticks(places, [number(place) for place in places])
    axes.minorticks_off()
    left, right = axes.get_xlim()
    across = [place for place in ticks(left, right, 6) if left <= place <= right]
    axes.set_xticks(across, [number(place) for place in across])
    axes.tick_params(labelsize=8, colors=LIGHT.muted)
    axes.grid(color=LIGHT.grid, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT.grid)
    axes.set_axisbelow(True)
