"""What is drawn of runs, whoever draws it: a terminal, matplotlib, or the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal

from tplaunch.report.curves import Curves, Point
from tplaunch.spec.validation import losses
from tplaunch.units import format_count

USUAL = ("loss", "lr", "grad_norm", "tokens_per_s")
_TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "mfu": "model FLOPs utilization",
    "step_time_s": "seconds of a step",
    "memory_peak_gib": "memory of the fullest rank (GiB)",
}
_WIDE = 30.0  # from this ratio of largest to smallest on, an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """A curve. `dots` are few and stand for themselves; a `level` is a prediction, the same everywhere."""

    label: str
    points: Sequence[Point]
    kind: Literal["line", "dots", "level"] = "line"
    colour: int = 0  # the number of the run


@dataclass(frozen=True)
class Chart:
    """Curves over one x-axis.

    Args:
        log: whether the y-axis is logarithmic.
    """

    key: str
    title: str
    x: str
    lines: Sequence[Line]
    log: bool


def charts(
    runs: Sequence[tuple[str, Curves]], keys: Sequence[str], x: str = "step", levels: dict[str, float] | None = None
) -> list[Chart]:
    """A chart of each metric that a run has; the loss's has validation losses as dots.

    Args:
        runs: names, and what they measured.
        x: step or tokens.
        levels: metric -> what was predicted of it.
    """
    found = []
    for key in keys:
        lines = []
        for number, (name, curves) in enumerate(runs):
            if points := curves.line(key, x):
                lines.append(Line(name, points, colour=number))
            if key == "loss":
                for loss, words in losses(curves.metrics()).items():
                    if points := curves.line(loss, x):
                        lines.append(Line(f"{name} {words}" if len(runs) > 1 else words, points, "dots", number))
        if lines:
            level = (levels or {}).get(key)
            if level is not None:
                ends = [point[0] for line in lines for point in line.points]
                lines.append(Line("predicted", [(min(ends), level), (max(ends), level)], "level"))
            found.append(Chart(key, _TITLES.get(key, key), x, lines, key != "lr" and _is_wide(lines)))
    return found


def _is_wide(lines: Sequence[Line]) -> bool:
    values = [y for line in lines for _, y in line.points]
    return min(values) > 1e-100 and max(values) / min(values) > _WIDE


def limits(chart: Chart) -> tuple[float, float]:
    """The ends of the y-axis: all points lie inside, with a little air; a flat curve lies in the middle."""
    values = [y for line in chart.lines for _, y in line.points]
    low, high = min(values), max(values)
    if chart.log:
        air = (high / low) ** 0.04
        return low / air, high * air
    air = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    lower = low - air
    return (0.0 if low >= 0 > lower else lower), high + air


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two ends, some `about` of them."""
    span = (high - low) / about
    power = 10.0 ** floor(log10(span))
    step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= span * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two ends; with their halves and fifths where they are few."""
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [p * 10.0**e for e in range(floor(log10(low)), ceil(log10(high)) + 1) for p in parts]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            return found[:: ceil(len(found) / 7)]
    return found or [low, high]


def number(value: float) -> str:
    """A number of an axis: short, and exact enough to tell it from its neighbours."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        text = format_count(value)
        digits, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
        return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit
    return (
        f"{value:.4g}"
        if abs(value) >= 1e-3
        else f"{value:.2e}".replace("e-0", "e-").replace(".00e", "e").replace("0e", "e")
    )
