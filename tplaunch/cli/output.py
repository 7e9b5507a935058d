"""Coloured text to standard output, in colours only where they are wanted."""

from __future__ import annotations

import os

import typer


def echo(text: str) -> None:
    """Print a text with ANSI colours: on a terminal with them, elsewhere without; NO_COLOR and FORCE_COLOR decide."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    typer.echo(text, color=False if plain else True if os.environ.get("FORCE_COLOR") else None)
