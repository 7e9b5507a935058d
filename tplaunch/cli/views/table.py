"""Tables for the terminal.

Colours are ANSI codes, which `tplaunch.cli.output.echo` leaves out where they are not wanted. (rich, which other
commands use, takes a tenth of the time in which `plan` must answer.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from typer import style

_CODES = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    """The text without colours."""
    return _CODES.sub("", text)


def columns(title: str, headings: list[str], rows: Sequence[Sequence[str]], left: frozenset[int]) -> str:
    """A table: columns as wide as they need, numbers to the right.

    Args:
        left: numbers of the columns that stand to the left.
    """
    cells = [[style(heading, bold=True) for heading in headings], *rows] if any(headings) else rows
    widths = [max(len(plain(cell)) for cell in column) for column in zip(*cells, strict=True)]
    lines = [style(title, italic=True)] if title else []
    for row in cells:
        padded = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            pad = " " * (width - len(plain(cell)))
            padded.append(pad + cell if i not in left else cell if i == len(row) - 1 else cell + pad)
        lines.append("  ".join(padded))
    return "\n".join(lines)
