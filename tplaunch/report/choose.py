"""Which runs of a list are shown, and in which order: `--filter` and `--sort`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from tplaunch.errors import Problem, TplaunchError
from tplaunch.report.rows import Row
from tplaunch.units import parse_count, parse_duration

_FILTER = re.compile(r"\s*([\w./@%-]+?)\s*(!=|>=|<=|=|>|<)\s*(.*?)\s*")
_NAMES = "state, step, loss, tokens_per_s, topology, age, a metric, or a recipe's key such as optimizer.lr"


def choose(rows: Sequence[Row], filters: Sequence[str]) -> list[Row]:
    """The rows that pass every filter.

    Args:
        filters: KEY=VALUE, !=, >, >=, < or <=. Text is compared with a pattern, in which * stands for anything.

    Raises:
        TplaunchError: one is no filter, or names what no run has.
    """
    tests = []
    for text in filters:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise TplaunchError(
                Problem(
                    f"{text!r} is no filter", fix='such as state=running, "loss<3" or topology.tp=8', key="--filter"
                )
            )
        key, sign, wanted = match.groups()
        _must_be_known(rows, key, "--filter")
        if sign in ("<", ">", "<=", ">=") and _number(wanted) is None:
            raise TplaunchError(Problem(f"{wanted!r} is no number to compare {key} with", key="--filter"))
        tests.append((key, sign, wanted))
    return [row for row in rows if all(_passes(row.value(key), sign, wanted) for key, sign, wanted in tests)]


def order(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows by a value, the smallest first, or with a "-" before the key the largest; those without it last.

    Raises:
        TplaunchError: no run has such a value.
    """
    name = key.removeprefix("-")
    _must_be_known(rows, name, "--sort")
    known = [row for row in rows if row.value(name) is not None]
    numbers = all(_is_number(row.value(name)) for row in known)
    known.sort(key=lambda row: row.value(name) if numbers else str(row.value(name)), reverse=key.startswith("-"))
    return [*known, *(row for row in rows if row.value(name) is None)]


def _must_be_known(rows: Sequence[Row], key: str, option: str) -> None:
    known = {name for row in rows for name in (*row.metrics, *row.recipe)} | Row.__dataclass_fields__.keys()
    if rows and key not in known:
        from difflib import get_close_matches

        near = get_close_matches(key, known, 3)
        raise TplaunchError(Problem(f"no run has {key!r}", fix=", ".join(near) or _NAMES, key=option))


def _passes(value: Any, sign: str, wanted: str) -> bool:
    number = _number(wanted)
    if sign in ("=", "!="):
        if number is not None and _is_number(value):
            same = float(value) == number
        else:
            same = fnmatchcase(_text(value), wanted)
        return same == (sign == "=")
    if number is None or not _is_number(value):
        return False
    return {">": value > number, "<": value < number, ">=": value >= number, "<=": value <= number}[sign]


def _text(value: Any) -> str:
    """A value as a recipe has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    """A number, also with the unit of a count (10K, 1B) or a duration (2h)."""
    for read in (float, parse_count, parse_duration):
        try:
            return float(read(text))
        except ValueError:
            continue
    return None
