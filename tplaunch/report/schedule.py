"""The course of a run, drawn before it runs: learning rate, batch, length of samples, mixture and weight decay by
tokens, and its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise

from tplaunch.report.charts import Chart, Line, number, ticks
from tplaunch.report.curves import Point
from tplaunch.report.palette import LIGHT
from tplaunch.report.svg import BOTTOM, LEFT, RIGHT, TOP, chart_svg
from tplaunch.spec.batches import Block
from tplaunch.spec.course import Course
from tplaunch.spec.mixture import Mixture, mixture_of
from tplaunch.spec.pieces import Curve
from tplaunch.units import format_count

_POINTS = 120  # of one piece
_WIDTH, _HEIGHT, _TITLE, _HEAD = 1100, 230, 26, 40
_NAMES, _LEAD = 18, 12  # height of the names of stages, and from there to the first chart
_LETTER, _GAP = 7.2, 10  # about how wide a letter is, and how far names stand apart
_SHADES = ("#eef3fa", "#ffffff")  # of stages, in turn
_STYLE = (
    f".tick{{fill:{LIGHT.muted};font-size:11px}}.grid{{stroke:{LIGHT.grid}}}.axis{{stroke:{LIGHT.muted}}}"
    f".curve{{fill:none;stroke:{LIGHT.run(0)};stroke-width:1.8;stroke-linejoin:round}}"
    f".stage{{fill:{LIGHT.muted};font-size:12px}}.lead{{stroke:{LIGHT.muted};stroke-width:.8;fill:none}}"
)


def schedule_charts(course: Course) -> list[Chart]:
    """Rates, batch and length of samples; those that change over the run, and the learning rate always."""
    found = [_chart("lr", _named("learning rate", course.rates), _rates(course, course.rates))]
    lengths, sizes = _steps(course, lambda block: block.seq_len), _steps(course, lambda block: block.size)
    longer = len({y for _, y in lengths}) > 1
    if longer:
        sizes = _steps(course, lambda block: block.size * block.seq_len)
    if len({y for _, y in sizes}) > 1:
        found.append(_chart("batch_size", f"batch size ({'tokens' if longer else 'samples'})", sizes))
    if longer:
        found.append(_chart("seq_len", "tokens of a sample", lengths, log=True))
    if course.recipe.optimizer.weight_decay_schedule is not None:
        found.append(_chart("weight_decay", _named("weight decay", course.decays), _rates(course, course.decays)))
    return found


def _chart(key: str, title: str, points: Sequence[Point], *, log: bool = False) -> Chart:
    return Chart(key, title, "tokens", [Line(title, points)], log=log)


def _named(title: str, curve: Curve) -> str:
    return f"{title} ({', '.join(part.formula.kind for part in curve.parts)})"


def _steps(course: Course, of: Callable[[Block], int]) -> list[Point]:
    """Points of what stays for a block of steps, where it begins and ends; blocks that are alike are one."""
    batches, found = course.batches, list[Point]()
    blocks = [block for block in batches.blocks if block.step < course.steps]
    for block, end in zip(blocks, [*(block.step for block in blocks[1:]), course.steps], strict=True):
        begin, value = float(batches.tokens(block.step)), float(of(block))
        if found and found[-1][1] == value:
            found.pop()
        else:
            found.append((begin, value))
        found.append((float(batches.tokens(end)), value))
    return found


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
    drawn = [(f"{chart.title} by tokens", chart_svg(chart, (), _WIDTH, _HEIGHT)) for chart in schedule_charts(course)]
    mixture = _few(mixture_of(course))
    if mixture is not None:
        drawn.append(("mixture by tokens", _mixture_svg(mixture, course)))
    above = _NAMES + _LEAD if course.recipe.training.stages else 0  # of the first chart, for the names of stages
    height = _HEAD + above + len(drawn) * (_TITLE + _HEIGHT)
    title = f"{course.recipe.name}: {course.steps:,} steps, {format_count(course.tokens)} tokens"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="{LIGHT.ink}">',
        f'<style>{_STYLE}</style><rect width="{_WIDTH}" height="{height}" fill="{LIGHT.background}"/>',
        f'<text x="12" y="24" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for place, (words, picture) in enumerate(drawn):
        y = _HEAD + place * (_TITLE + _HEIGHT) + above * (place > 0)
        parts.append(f'<text x="12" y="{y + 16}">{escape(words)}</text>')
        if mixture is not None and place == len(drawn) - 1:
            parts += _legend(mixture, 24 + _LETTER * len(words), y + 16)
        if above and not place:
            parts += ['<g class="stages">', *_names(course, y + _TITLE + _NAMES - 4), "</g>"]
            y += above
        parts += _shades(course, y + _TITLE + TOP)
        where = f'<svg x="0" y="{y + _TITLE}" width="{_WIDTH}" height="{_HEIGHT}" '
        parts.append(picture.replace("<svg ", where, 1))
    return "\n".join([*parts, "</svg>", ""])


def _x(course: Course, tokens: float) -> float:
    """Where in the picture so many tokens are: as in every chart, which all begin at none and end with the run."""
    return LEFT + tokens / course.tokens * (_WIDTH - LEFT - RIGHT)


def _bounds(course: Course) -> list[tuple[float, float]]:
    """Where each stage begins and ends in the picture."""
    ends = [course.batches.tokens(steps.stop - 1) for steps in course.stages]
    return list(pairwise(_x(course, tokens) for tokens in (0, *ends)))


def _shades(course: Course, top: float) -> Iterator[str]:
    """The stages behind a chart."""
    if course.recipe.training.stages is None:
        return
    for place, (left, right) in enumerate(_bounds(course)):
        yield (
            f'<rect x="{left:.1f}" y="{top}" width="{max(right - left, 0.6):.1f}" height="{_HEIGHT - TOP - BOTTOM}" '
            f'fill="{_SHADES[place % 2]}"/>'
        )


def _names(course: Course, y: float) -> Iterator[str]:
    """The names of the stages above the charts, each over its middle or as near as its neighbours let it be; a line
    leads from a name that is wider than its stage.

    Args:
        y: where the names stand.
    """
    stages, bounds = course.recipe.training.stages or (), _bounds(course)
    names = [stage.name or str(number) for number, stage in enumerate(stages, 1)]
    if sum(_LETTER * len(name) + _GAP for name in names) > _WIDTH - LEFT - RIGHT:
        names = [str(number) for number in range(1, len(names) + 1)]
    widths = [_LETTER * len(name) for name in names]
    begins = [(left + right - width) / 2 for (left, right), width in zip(bounds, widths, strict=False)]
    end = float(LEFT - _GAP)
    for place, width in enumerate(widths):
        begins[place] = max(begins[place], end + _GAP)
        end = begins[place] + width
    end = float(_WIDTH + _GAP)
    for place in range(len(names) - 1, -1, -1):
        begins[place] = min(begins[place], end - _GAP - widths[place])
        end = begins[place]
    for name, begin, width, (left, right) in zip(names, begins, widths, bounds, strict=False):
        yield f'<text class="stage" x="{begin + width / 2:.1f}" y="{y}" text-anchor="middle">{escape(name)}</text>'
        if width > right - left:
            to = f"{(left + right) / 2:.1f},{y + _LEAD + TOP}"
            yield f'<path class="lead" d="M{begin + width / 2:.1f},{y + 4}L{to}"/>'


def _mixture_svg(mixture: Mixture, course: Course) -> str:
    """The shares of the corpora, stacked."""
    high, parts = _HEIGHT - TOP - BOTTOM, list[str]()
    begin = 0.0
    for end, shares in zip(mixture.ends, mixture.shares, strict=True):
        left, right = _x(course, begin), _x(course, course.batches.tokens(end))
        begin, above = course.batches.tokens(end), 0.0
        for kind, (name, share) in enumerate(zip(mixture.names, shares, strict=True)):
            if share:
                words = f"<title>{escape(name)}: {share:.1%} until step {end:,}</title>"
                place = f'x="{left:.1f}" y="{TOP + above * high:.1f}" width="{right - left:.1f}"'
                parts.append(f'<rect {place} height="{share * high:.1f}" fill="{_colour(kind)}">{words}</rect>')
            above += share
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + (1 - share) * high
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{share:.0%}</text>')
    for value in ticks(0.0, course.tokens, _WIDTH // 110):
        anchor = "end" if _x(course, value) > _WIDTH - RIGHT - 12 else "middle"
        where = f'x="{_x(course, value):.1f}" y="{_HEIGHT - BOTTOM + 16}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {where}>{number(value)}</text>')
    return "".join([f'<svg class="mixture" viewBox="0 0 {_WIDTH} {_HEIGHT}">', *parts, "</svg>"])


def _few(mixture: Mixture | None) -> Mixture | None:
    """A mixture of no more corpora than there are colours: the last of many together."""
    most = len(LIGHT.parts)
    if mixture is None or len(mixture.names) <= most:
        return mixture
    names = [*mixture.names[: most - 1], f"{len(mixture.names) - most + 1} others"]
    return Mixture(names, mixture.ends, [(*row[: most - 1], sum(row[most - 1 :])) for row in mixture.shares])


def _colour(kind: int) -> str:
    return LIGHT.parts[kind]


def _legend(mixture: Mixture, x: float, y: float) -> Iterator[str]:
    """The colours of the corpora, beside the title of their chart."""
    for kind, name in enumerate(mixture.names):
        yield f'<g><rect x="{x:.1f}" y="{y - 10}" width="11" height="11" fill="{_colour(kind)}"/>'
        yield f'<text x="{x + 16:.1f}" y="{y}">{escape(name)}</text></g>'
        x += 16 + _LETTER * len(name) + 18
