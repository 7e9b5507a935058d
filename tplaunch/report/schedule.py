"""The course of a run, drawn before it runs: learning rate, batch size and weight decay by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tplaunch.report.charts import Chart, Line
from tplaunch.report.curves import Point
from tplaunch.report.palette import LIGHT
from tplaunch.report.svg import chart_svg
from tplaunch.spec.course import Course
from tplaunch.spec.pieces import Curve
from tplaunch.units import format_count

_POINTS = 120  # of one piece
_WIDTH, _HEIGHT, _TITLE, _HEAD = 1100, 230, 26, 40
_STYLE = (
    f".tick{{fill:{LIGHT.muted};font-size:11px}}.grid{{stroke:{LIGHT.grid}}}.axis{{stroke:{LIGHT.muted}}}"
    f".curve{{fill:none;stroke:{LIGHT.run(0)};stroke-width:1.8;stroke-linejoin:round}}"
)


def schedule_charts(course: Course) -> list[Chart]:
    """What changes over the run; the learning rate always."""
    found = [_chart("lr", _named("learning rate", course.rates), _rates(course, course.rates))]
    batches = course.batches
    blocks = [block for block in batches.blocks if block.step < course.steps]
    if len(blocks) > 1:
        ends = [*(block.step for block in blocks[1:]), course.steps]
        points = [
            (float(batches.tokens(step)), float(block.size))
            for block, end in zip(blocks, ends, strict=True)
            for step in (block.step, end)
        ]
        found.append(_chart("batch_size", "batch size (samples)", points))
    if course.recipe.optimizer.weight_decay_schedule is not None:
        found.append(_chart("weight_decay", _named("weight decay", course.decays), _rates(course, course.decays)))
    return found


def _chart(key: str, title: str, points: Sequence[Point]) -> Chart:
    return Chart(key, title, "tokens", [Line(title, points)], log=False)


def _named(title: str, curve: Curve) -> str:
    return f"{title} ({', '.join(part.formula.kind for part in curve.parts)})"


def _rates(course: Course, curve: Curve) -> list[Point]:
    """Points of a rate, in each piece where its steps end."""
    points: list[Point] = [(0.0, curve.parts[0].formula.start)]
    for part in curve.parts:
        last = min(part.last, course.steps)
        count = 2 if part.formula.kind in ("constant", "warmup", "linear") else _POINTS
        count = min(count, last - part.first + 1)
        steps = [part.first + (last - part.first) * i // max(1, count - 1) for i in range(count)]
        points += [(float(course.batches.tokens(step)), curve.at(step)) for step in steps]
    return points


def schedule_svg(course: Course) -> str:
    """The charts below each other, as a picture that stands by itself."""
    charts = schedule_charts(course)
    height = _HEAD + len(charts) * (_TITLE + _HEIGHT)
    title = f"{course.recipe.name}: {course.steps:,} steps, {format_count(course.tokens)} tokens"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="{LIGHT.ink}">',
        f'<style>{_STYLE}</style><rect width="{_WIDTH}" height="{height}" fill="{LIGHT.background}"/>',
        f'<text x="12" y="24" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for number, chart in enumerate(charts):
        y = _HEAD + number * (_TITLE + _HEIGHT)
        parts.append(f'<text x="12" y="{y + 16}">{escape(chart.title)} by tokens</text>')
        place = f'<svg x="0" y="{y + _TITLE}" width="{_WIDTH}" height="{_HEIGHT}" '
        parts.append(chart_svg(chart, (), _WIDTH, _HEIGHT).replace("<svg ", place, 1))
    return "\n".join([*parts, "</svg>", ""])
