"""Runs side by side, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer import style

from tplaunch.cli.views.run_show import value_text
from tplaunch.cli.views.table import columns
from tplaunch.report.compare import MISSING, Measure
from tplaunch.units import format_count

_LONGEST = 40  # characters of a value


def compare_text(names: Sequence[str], differing: dict[str, list[Any]], measures: Sequence[Measure]) -> str:
    """Two tables: where recipes differ, and what curves say. The best of the losses is marked."""
    parts = []
    if differing:
        rows = [[key, *(_value(value) for value in values)] for key, values in differing.items()]
        left = frozenset(range(len(names) + 1))
        parts.append(columns("Recipes differ in", ["", *names], rows, left))
    else:
        parts.append("the recipes are alike")
    if measures:
        rows = [[one.name, *_values(one)] for one in measures]
        parts.append(columns("Curves", ["", *names], rows, frozenset((0,))))
    else:
        parts.append("no run has a record yet")
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    text = "-" if value is MISSING else value_text(value)
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _values(one: Measure) -> list[str]:
    known = [value for value in one.values if value is not None]
    best = min(known) if "loss" in one.name and len(known) > 1 else None
    cells = []
    for value, note in zip(one.values, one.notes, strict=True):
        text = "-" if value is None else _number(one.name, value)
        beside = style(f" ({note})", dim=True) if note and value is not None else ""
        cells.append(style(text, fg="green" if value is not None and value == best else None) + beside)
    return cells


def _number(name: str, value: float) -> str:
    if name in ("tokens", "tokens/s"):
        return format_count(value)
    return f"{value:.1%}" if name == "MFU" else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
