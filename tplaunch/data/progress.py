"""A progress bar on standard error, shown only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Shows how far a task is.

    Args:
        shown: without it, and where standard error is no terminal, nothing is printed.
    """

    shown: bool = True

    @contextmanager
    def task(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for one task; what is yielded takes the amount done since its last call."""
        # Here and below, not above: ranks read corpora, and show no bar.
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with RichProgress(
            *columns, console=console, transient=True, disable=not (self.shown and console.is_terminal)
        ) as bar:
            task = bar.add_task(text, total=total)
            yield lambda amount: bar.advance(task, amount)

    def say(self, text: str) -> None:
        """One line, also where there is no terminal."""
        from rich.console import Console

        if self.shown:
            Console(stderr=True).print(text, highlight=False)
