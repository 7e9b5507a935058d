"""A run as one HTML page that needs nothing else: no network, no other file, and no script to be read.

What comes from files is text: all of it is escaped, and the page's policy allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from tplaunch import __version__
from tplaunch.report.charts import charts
from tplaunch.report.drawings import in_words, memory_svg, step_svg, topology_svg
from tplaunch.report.evaluations import evaluation_table
from tplaunch.report.facts import RunFacts
from tplaunch.report.palette import DARK, LIGHT, Palette
from tplaunch.report.prediction import Figure, in_unit
from tplaunch.report.story import Mark, gathered, when
from tplaunch.report.svg import chart_svg
from tplaunch.run.directory import RunDir, read_recipe
from tplaunch.spec.topology import Topology
from tplaunch.spec.validation import losses
from tplaunch.units import format_bytes, format_count, format_duration

_DRAWN = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_peak_gib", "step_time_s")
_WHOLE, _HALF = (1096, 340), (535, 230)
_EVENTS = 300  # rows
_STATES = {"running": "good", "done": "good", "failed": "bad", "gone": "bad"}
_HERE = Path(__file__).parent


def page(facts: RunFacts) -> str:
    """The report of a run."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = [
        _head(facts),
        _section("Curves", _curves(facts)),
        _section("Predicted and measured", _plan(facts)),
        _section("Topology", _topology(facts)),
        _section("Branches", _branches(facts)),
        _section("Attempts", _attempts(facts)),
        _section("Events", _events(facts.marks)),
        _section("Checkpoints", _checkpoints(facts)),
        _section("Evaluations", _evaluations(facts)),
        _section("Samples", _samples(facts)),
        _section("Environment", _environment(facts)),
        _section("Recipe", f'<pre class="recipe">{escape(facts.recipe)}</pre>' if facts.recipe else ""),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(facts.row.name)}</title>'
        f"<style>{_style()}</style></head>\n<body>\n{''.join(body)}\n<script>{script}</script>\n</body></html>\n"
    )


def _style() -> str:
    """The page's style, with the colours of both backgrounds; paper is light."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    runs = "".join(
        f"svg .curve.c{i}{{stroke:var(--run{i})}}svg .dots.c{i} circle{{fill:var(--run{i})}}"
        f"svg .rank.r{i} rect{{fill:var(--run{i});stroke:var(--run{i})}}"
        for i in range(len(LIGHT.runs))
    )
    parts = "".join(f"svg .p{i}{{fill:var(--part{i})}}" for i in range(len(LIGHT.parts)))
    return f":root{{{_variables(LIGHT)}}}{dark}{(_HERE / 'page.css').read_text(encoding='utf-8')}{runs}{parts}"


def _variables(palette: Palette) -> str:
    plain = ("background", "surface", "ink", "muted", "grid", "good", "warn", "bad")
    values = {name: getattr(palette, name) for name in plain}
    values |= {f"run{i}": colour for i, colour in enumerate(palette.runs)}
    values |= {f"part{i}": colour for i, colour in enumerate(palette.parts)}
    return ";".join(f"--{name}:{value}" for name, value in values.items())


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def _head(facts: RunFacts) -> str:
    row, curves = facts.row, facts.curves
    best = curves.best("loss")
    validation = {words: curves.best(key) for key, words in losses(curves.metrics()).items()}
    mfu, rate, tokens = curves.typical("mfu"), curves.typical("tokens_per_s"), curves.last("tokens")
    steps = "" if row.steps is None else f"of {row.steps:,} steps"
    tiles = [
        (f"{row.step or 0:,}", steps or "steps"),
        (_loss(row.loss), "loss"),
        (_loss(best[1]) if best else "", f"best loss, step {best[0]:,.0f}" if best else ""),
        *((_loss(one[1]), f"best {escape(words)}, step {one[0]:,.0f}") for words, one in validation.items() if one),
        ("" if tokens is None else format_count(tokens), "tokens"),
        ("" if rate is None else format_count(rate), "tokens/s, median"),
        ("" if mfu is None else f"{mfu:.1%}", "MFU, median"),
        ("" if not (spent := _spent(facts)) else format_duration(spent), "in attempts"),
    ]
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    shown = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles if a)
    bad = f" {curves.bad} bad line{'s' * (curves.bad > 1)} of metrics.jsonl left out." if curves.bad else ""
    why = f'<span class="quiet">{escape(row.why)}</span>' if row.why else ""
    state = f'<span class="state {_STATES.get(row.state, "warn")}">{escape(row.state)}</span>'
    where = f"{escape(row.topology)} · {escape(str(row.run))} · report of {made} by tplaunch {__version__}.{bad}"
    return (
        f"<header><h1>{escape(row.name)}</h1>{state}{why}</header>"
        f'<p class="quiet">{where}</p><div class="tiles">{shown}</div>'
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _spent(facts: RunFacts) -> float:
    """Seconds of all attempts; one that goes on, until now; one that ended without a word, until its last record."""
    total = 0.0
    last = facts.curves.last("time")
    for i, one in enumerate(facts.attempts):
        newest = i == len(facts.attempts) - 1
        end = one.ended or (time.time() if newest and facts.row.state == "running" else last if newest else None)
        total += max(0.0, (end or one.began) - one.began)
    return total


def _curves(facts: RunFacts) -> str:
    plan = facts.plan or {}
    levels = {"tokens_per_s": plan.get("tokens_per_s"), "mfu": plan.get("mfu"), "step_time_s": plan.get("step_seconds")}
    known = {key: value for key, value in levels.items() if value is not None}
    drawn = charts([("", facts.curves)], _DRAWN, levels=known)
    if not drawn:
        return '<p class="quiet">No record yet.</p>'
    found = []
    for chart in drawn:
        whole = chart.key == "loss"
        named = [type(line)(line.label or chart.key, line.points, line.kind, line.colour) for line in chart.lines]
        picture = chart_svg(
            type(chart)(chart.key, chart.title, chart.x, named, chart.log), facts.marks, *(_WHOLE if whole else _HALF)
        )
        log = ' <span class="quiet">(log)</span>' if chart.log else ""
        found.append(
            f'<div class="figure{" whole" if whole else ""}"><header><h3>{escape(chart.title)}{log}</h3>'
            f'<span class="values"></span></header>{picture}{_key(facts) if whole else ""}</div>'
        )
    return f'<div class="charts">{"".join(found)}</div>'


_SIGNS = {
    "validation": ("validation loss", '<g class="dots c0"><circle cx="8" cy="6" r="3"/></g>'),
    "predicted": ("predicted", '<line class="level" x1="0" x2="16" y1="6" y2="6"/>'),
    "attempt": ("a further attempt began", '<g class="mark attempt"><line x1="8" x2="8" y1="0" y2="12"/></g>'),
    "checkpoint": ("checkpoint", '<g class="mark checkpoint"><path d="M8,2l4,8h-8z"/></g>'),
    "loss": ("loss spike, skipped step or rollback", '<g class="mark loss"><path d="M8,10l4,-8h-8z"/></g>'),
    "straggler": ("straggler", '<g class="mark straggler"><path d="M8,10l4,-8h-8z"/></g>'),
    "fault": ("fault or failed attempt", '<g class="mark fault"><line x1="8" x2="8" y1="0" y2="12"/></g>'),
}


def _key(facts: RunFacts) -> str:
    """What the signs on the curves mean, of those that are there."""
    kinds = {str(mark.kind) for mark in facts.marks if not (mark.kind == "attempt" and mark.step == 0)}
    if losses(facts.curves.metrics()):
        kinds.add("validation")
    if facts.plan is not None:
        kinds.add("predicted")
    shown = [
        f'<li><svg viewBox="0 0 16 12">{sign}</svg>{text}</li>'
        for kind, (text, sign) in _SIGNS.items()
        if kind in kinds
    ]
    return f'<ul class="key">{"".join(shown)}</ul>' if shown else ""


def _plan(facts: RunFacts) -> str:
    parts = []
    if facts.figures:
        parts.append(_figure_table(facts.figures))
    if facts.plan is not None:
        parts.append(
            f'<p class="quiet">Planned for {escape(facts.plan["gpu"])}; measured are medians, of memory the peak.</p>'
        )
    else:
        parts.append(f'<p class="quiet">Nothing was predicted: {escape(facts.no_plan)}.</p>')
    measured = {key: value for key in facts.curves.metrics() if (value := facts.curves.typical(key)) is not None}
    if picture := step_svg(facts.plan, measured):
        parts.append(f'<div class="figure"><h3>A step</h3>{picture}</div>')
    if picture := memory_svg(facts.plan, facts.stages, facts.curves.peak("memory_peak_gib")):
        parts.append(f'<div class="figure"><h3>Memory by pipeline rank</h3>{picture}</div>')
    return "".join(parts)


def _figure_table(figures: Sequence[Figure]) -> str:
    if all(one.predicted is None for one in figures):
        return _table(("", "measured"), [(one.name, in_unit(one.measured, one.unit)) for one in figures], "-n")
    rows = []
    for one in figures:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        rows.append((one.name, in_unit(one.predicted, one.unit), in_unit(one.measured, one.unit), ratio))
    return _table(("", "predicted", "measured", "measured/predicted"), rows, "-nnn")


def _topology(facts: RunFacts) -> str:
    recipe = read_recipe(RunDir(facts.row.run))
    if recipe is None:
        return ""
    try:
        topology = Topology.of(recipe)
    except ValueError:  # dp was never resolved: no launch wrote this recipe
        return ""
    picture, left_out = topology_svg(topology)
    note = f'<p class="quiet">{escape(left_out)}</p>' if left_out else ""
    return f"<p>{escape(in_words(topology, recipe.model))} Colours are pipeline ranks.</p>{picture}{note}"


def _branches(facts: RunFacts) -> str:
    """The tree of runs that branched from each other, as lists in lists."""
    parts, deepest = [], -1
    for depth, row in facts.family:
        parts.append("<ul>" if depth > deepest else "</li>" + "</ul></li>" * (deepest - depth))
        name = f"<b>{escape(row.name)}</b>" if row.run == facts.row.run.absolute() else escape(row.name)
        where = "" if row.parent_step is None else f"from step {row.parent_step:,}, "
        loss = "" if row.loss is None else f", loss {_loss(row.loss)}"
        about = f'<span class="quiet">{where}at step {row.step or 0:,}{loss}, {escape(row.state)}</span>'
        parts.append(f"<li>{name} {about}")
        deepest = depth
    return "".join([*parts, "</li></ul>" * (deepest + 1)])


def _attempts(facts: RunFacts) -> str:
    rows = []
    for one in facts.attempts:
        changes = "".join(f"<br>{escape(f'{key}: {was} → {now}')}" for key, (was, now) in one.changes.items())
        took = "" if one.ended is None else format_duration(one.ended - one.began)
        where = escape(" ".join([*([f"job {one.job}"] if one.job else []), *map(str, one.nodes)]))
        end = escape(one.why or ("it has not ended" if one.ended is None else f"code {one.code}"))
        cells = (str(one.number), when(one.began), f"{one.step:,}", took, where, f"{end}{changes}")
        rows.append((cells, "bad" if one.code == 1 else ""))
    return _raw_table(("", "began", "from step", "took", "where", "how it ended, and what changed"), rows, "ntnn--")


def _events(marks: Sequence[Mark]) -> str:
    found = list(gathered(marks))
    rows = [((when(one.time), f"{one.step:,.0f}", escape(one.text)), one.kind) for one in found[-_EVENTS:]]
    note = (
        f'<p class="quiet">The last {_EVENTS} of {len(found):,}; all are in events.jsonl.</p>'
        if len(found) > _EVENTS
        else ""
    )
    return note + _raw_table(("", "step", ""), rows, "tn-")


def _checkpoints(facts: RunFacts) -> str:
    rows = [
        (f"{one.step:,}", format_bytes(one.size), when(one.time), one.damage or "complete") for one in facts.checkpoints
    ]
    return _table(("step", "size", "written", ""), rows, "nnt-")


def _evaluations(facts: RunFacts) -> str:
    headings, rows = evaluation_table(facts.evaluations)
    return _table(headings, rows, "n-" + "n" * (len(headings) - 2))


def _samples(facts: RunFacts) -> str:
    return "".join(
        f'<div class="sample"><p class="quiet">step {escape(str(one.get("step", "?")))}</p>'
        f"<pre><b>{escape(str(one.get('prompt', '')))}</b>{escape(one['text'])}</pre></div>"
        for one in facts.samples
    )


def _environment(facts: RunFacts) -> str:
    return _table(("", ""), list(facts.environment.items()), "--")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> str:
    """A table of texts; see `_raw_table`."""
    return _raw_table(headings, [([escape(cell) for cell in row], "") for row in rows], kinds)


def _raw_table(headings: Sequence[str], rows: Sequence[tuple[Iterable[str], str]], kinds: str) -> str:
    """A table of HTML; "" without rows.

    Args:
        rows: cells, and the class of the row.
        kinds: of each column: n for numbers, t for times, - for text.
    """
    if not rows:
        return ""

    def line(tag: str, cells: Iterable[Any], kind: str = "") -> str:
        told = "".join(f'<{tag} class="{k}">{cell}</{tag}>' for k, cell in zip(kinds, cells, strict=True))
        return f'<tr class="{kind}">{told}</tr>'

    head = f"<thead>{line('th', headings)}</thead>" if any(headings) else ""
    return f"<table>{head}<tbody>{''.join(line('td', cells, kind) for cells, kind in rows)}</tbody></table>"
