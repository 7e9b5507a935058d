"""Text to standard output: colours only where they are wanted, paths as short as they can be."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def echo(text: str) -> None:
    """Print a text with ANSI colours: on a terminal with them, elsewhere without; NO_COLOR and FORCE_COLOR decide."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    typer.echo(text, color=False if plain else True if os.environ.get("FORCE_COLOR") else None)


def short_path(path: Path) -> str:
    """A path from here, where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
