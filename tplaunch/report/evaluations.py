"""What checkpoints were found to know, as the texts of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Name in a record -> heading, and how the figure is written.
_FIGURES = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ",.5g"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "tokens": ("tokens", ",.0f"),
    "acc": ("acc", ".4f"),
    "acc_norm": ("acc_norm", ".4f"),
    "acc_bytes": ("acc_bytes", ".4f"),
    "questions": ("questions", ",.0f"),
}


def evaluation_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row a record (`run.evaluations`): step, data, and the figures that some of them have."""
    shown = [name for name in _FIGURES if any(_is_number(record.get(name)) for record in records)]
    headings = ["step", "data", *(_FIGURES[name][0] for name in shown)]
    rows = [
        [f"{record['step']:,}", record["data"], *(_figure(record.get(name), _FIGURES[name][1]) for name in shown)]
        for record in records
    ]
    return headings, rows


def _figure(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
