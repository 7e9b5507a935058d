"""Runs side by side: where their recipes differ, and how far each came at equal step and equal tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tplaunch.recipe.tree import parse
from tplaunch.report.curves import Curves
from tplaunch.run.directory import RunDir
from tplaunch.spec.validation import losses

# What differs of itself between two runs: where their files lie.
_OWN = ("name", "data.tokenizer")
MISSING = object()


@dataclass(frozen=True)
class Measure:
    """One figure of each run; None: it has none.

    Args:
        notes: what stands beside each, such as the step of the best loss.
    """

    name: str
    values: list[float | None]
    notes: list[str]


def recipe_values(run: RunDir) -> dict[str, Any]:
    """Every value of a run's recipe by dotted key, lists whole; {} where it cannot be read."""
    try:
        text = run.recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    tree, problems = parse(text, "recipe.yaml", "", positions=False)
    if tree is None or problems:
        return {}
    found, lists = {}, tuple[str, ...]()
    for key, node in tree.walk():
        if key.startswith(lists):
            continue
        if isinstance(node.value, list):
            found[key] = node.plain()
            lists += (f"{key}[",)
        elif not isinstance(node.value, dict):
            found[key] = node.value
    return found


def differences(runs: Sequence[RunDir]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run (MISSING where it has none), of those that differ."""
    each = [recipe_values(run) for run in runs]
    keys = list(dict.fromkeys(key for values in each for key in values))
    rows = {key: [values.get(key, MISSING) for values in each] for key in keys if key not in _OWN}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def measures(curves: Sequence[Curves]) -> list[Measure]:
    """What the runs' curves say, side by side."""
    found = []
    validation = losses(key for one in curves for key in one.metrics())
    for key, name in {"loss": "loss", **{key: f"{words} loss" for key, words in validation.items()}}.items():
        if not any(one.last(key) is not None for one in curves):
            continue
        found.append(Measure(f"final {name}", [one.last(key) for one in curves], _final_steps(curves, key)))
        best = [one.best(key) for one in curves]
        steps = [f"step {point[0]:,.0f}" if point else "" for point in best]
        found.append(Measure(f"best {name}", [point[1] if point else None for point in best], steps))
        for along in ("step", "tokens"):
            ends = [max((x for x, _ in one.points(key, along)), default=None) for one in curves]
            known = [end for end in ends if end is not None]
            if len(known) == len(ends) and len(set(ends)) > 1:
                place = min(known)
                words = f"step {place:,.0f}" if along == "step" else f"{_count(place)} tokens"
                found.append(Measure(f"{name} at {words}", [one.at(key, place, along) for one in curves], []))
    for key, name in (
        ("tokens", "tokens"),
        ("tokens_per_s", "tokens/s"),
        ("mfu", "MFU"),
        ("step_time_s", "step time (s)"),
    ):
        values = [one.last(key) if key == "tokens" else one.typical(key) for one in curves]
        if any(value is not None for value in values):
            found.append(Measure(name, values, []))
    return [Measure(one.name, one.values, one.notes or [""] * len(curves)) for one in found]


def _final_steps(curves: Sequence[Curves], key: str) -> list[str]:
    ends = [one.points(key)[-1:] for one in curves]
    return [f"step {end[0][0]:,.0f}" if end else "" for end in ends]


def _count(value: float) -> str:
    from tplaunch.units import format_count

    return format_count(value)
