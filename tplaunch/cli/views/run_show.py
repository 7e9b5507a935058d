"""One run for the terminal: how it stands, its attempts, its events, prediction beside measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer import style

from tplaunch.cli.output import short_path
from tplaunch.cli.views.table import columns
from tplaunch.launch.console import evaluated
from tplaunch.report.evaluations import evaluation_table
from tplaunch.report.facts import RunFacts
from tplaunch.report.prediction import Figure, in_unit
from tplaunch.report.story import Attempt, Mark, gathered, when
from tplaunch.spec.validation import losses
from tplaunch.units import format_bytes, format_count, format_duration

_SHOWN = 40  # events; the file has all
_COLOURS = {"fault": "red", "loss": "yellow", "straggler": "yellow", "attempt": "cyan"}


def show_text(facts: RunFacts) -> str:
    """A run, whole."""
    parts = [_head(facts), _figures("Predicted and measured", facts.figures, facts.no_plan)]
    if any(one.measured is not None for one in facts.stages):
        parts.append(_figures("Memory by pipeline rank, allocated", facts.stages, ""))
    parts += [
        _branches(facts),
        _attempts(facts.attempts),
        _checkpoints(facts),
        _evaluations(facts),
        _events(facts.marks),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(facts: RunFacts) -> str:
    row, curves = facts.row, facts.curves
    best = curves.best("loss")
    validation = losses(curves.metrics())
    width = max([12, *(len(words) + 2 for words in validation.values())])
    lines = [
        ("run", short_path(row.run)),
        ("state", " - ".join(filter(None, (row.state, row.why)))),
        ("step", f"{row.step or 0:,} of {'?' if row.steps is None else format(row.steps, ',')}"),
        ("loss", _last_and_best(curves.last("loss"), best)),
        *((words, _last_and_best(curves.last(key), curves.best(key))) for key, words in validation.items()),
        *_tasks(facts),
        ("tokens", "" if (tokens := curves.last("tokens")) is None else format_count(tokens)),
        ("began with", facts.initial),
        ("branch of", _origin(facts)),
        ("topology", row.topology),
        ("job", row.job),
        ("age", "" if row.age is None else format_duration(row.age)),
        ("environment", ", ".join(f"{key} {value}" for key, value in facts.environment.items() if key in _VERSIONS)),
        ("left out", f"{curves.bad} bad line{'s' * (curves.bad > 1)} of metrics.jsonl" if curves.bad else ""),
    ]
    return "\n".join(f"{style(f'{name:<{width}}', bold=True)}{text}" for name, text in lines if text)


def _tasks(facts: RunFacts) -> list[tuple[str, str]]:
    """What the tasks of `eval` gave last."""
    for record in reversed(facts.curves.records):
        if found := evaluated(record):
            lines = [("evaluated", text) for text in found.values()]
            return [*lines[:-1], (lines[-1][0], f"{lines[-1][1]} (step {record['step']:,})")]
    return []


_VERSIONS = ("tplaunch", "torch", "python", "GPU")


def _last_and_best(last: float | None, best: tuple[float, float] | None) -> str:
    if last is None or best is None:
        return ""
    return f"{last:.4f}, best {best[1]:.4f} at step {best[0]:,.0f}"


def _figures(title: str, figures: Sequence[Figure], without: str) -> str:
    if not figures:
        return ""
    note = f"\nno prediction: {without}" if without else ""
    if all(one.predicted is None for one in figures):
        rows = [[one.name, in_unit(one.measured, one.unit)] for one in figures]
        return columns("Measured", ["", ""], rows, frozenset((0,))) + note
    rows = [
        [one.name, in_unit(one.predicted, one.unit), in_unit(one.measured, one.unit), _ratio(one.ratio)]
        for one in figures
    ]
    return columns(title, ["", "predicted", "measured", "measured/predicted"], rows, frozenset((0,))) + note


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _attempts(attempts: Sequence[Attempt]) -> str:
    lines = [style("Attempts", italic=True)]
    for one in attempts:
        took = "" if one.ended is None else f", {format_duration(one.ended - one.began)}"
        place = "from the beginning" if not one.step else f"from step {one.step:,}"
        job = f", job {one.job}" if one.job else ""
        end = one.why or ("" if one.ended is None else f"code {one.code}") or "has not ended"
        lines.append(f"{one.number:>3}  {when(one.began)}  {place}{took}{job}: {end}")
        lines += [
            f"     changed {key}: {value_text(was)} -> {value_text(now)}" for key, (was, now) in one.changes.items()
        ]
    return "\n".join(lines) if attempts else ""


def value_text(value: Any) -> str:
    """A recipe's value as YAML would have it, in a line."""
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _origin(facts: RunFacts) -> str:
    row = facts.row
    return "" if row.parent is None else f"{short_path(Path(row.parent))}, step {row.parent_step:,}"


def _branches(facts: RunFacts) -> str:
    rows = [
        [
            style("  " * depth + row.name, bold=row.run == facts.row.run.absolute()),
            "" if row.parent_step is None else f"{row.parent_step:,}",
            row.state,
            f"{row.step or 0:,}",
            "" if row.loss is None else f"{row.loss:.4f}",
        ]
        for depth, row in facts.family
    ]
    headings = ["run", "from step", "state", "step", "loss"]
    return columns("Branches", headings, rows, frozenset((0, 2))) if rows else ""


def _checkpoints(facts: RunFacts) -> str:
    rows = [
        [f"{one.step:,}", format_bytes(one.size), when(one.time), one.damage or "complete"] for one in facts.checkpoints
    ]
    return columns("Checkpoints", ["step", "size", "written", ""], rows, frozenset((3,))) if rows else ""


def _evaluations(facts: RunFacts) -> str:
    headings, rows = evaluation_table(facts.evaluations)
    return columns("Evaluations", headings, rows, frozenset((1,))) if rows else ""


def _events(marks: Sequence[Mark]) -> str:
    found = list(gathered(marks))
    if not found:
        return ""
    hidden = f" (the last {_SHOWN} of {len(found)}; all: events.jsonl)" if len(found) > _SHOWN else ""
    rows = [[when(one.time), f"{one.step:,.0f}", style(one.text, fg=_COLOURS.get(one.kind))] for one in found[-_SHOWN:]]
    return columns(f"Events{hidden}", ["", "step", ""], rows, frozenset((0, 2)))
