"""Runs that go on: on a terminal a table that is drawn again, elsewhere a line a record."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tplaunch.report.watch import Watched
from tplaunch.sparkline import sparkline
from tplaunch.units import format_count, format_duration

_STYLES = {"running": "green", "failed": "red", "gone": "red", "done": "blue"}


class WatchView:
    """Shows watched runs.

    Args:
        names: of the runs, in order.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self.live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self.live = Live(console=console, auto_refresh=False)
            self.live.start()
        self.states = [""] * len(names)

    def show(self, runs: Sequence[Watched]) -> None:
        """Show what is new."""
        if self.live is not None:
            self.live.update(self._table(runs), refresh=True)
            return
        for i, (name, one) in enumerate(zip(self.names, runs, strict=True)):
            for record in one.new:
                steps = "" if one.row.steps is None else f"/{one.row.steps}"
                figures = _figures(record.get("loss"), record.get("tokens_per_s"))
                self.console.print("  ".join([name, f"step {record['step']}{steps}", *figures]), soft_wrap=True)
            if one.row.state != self.states[i]:
                self.states[i] = one.row.state
                self.console.print("  ".join(filter(None, (name, one.row.state, one.row.why))), soft_wrap=True)

    def close(self) -> None:
        """Leave the last picture on the screen."""
        if self.live is not None:
            self.live.stop()

    def _table(self, runs: Sequence[Watched]) -> Table:
        wide = self.console.width >= 110
        reasons = ["" if one.row.state == "done" else one.row.why for one in runs]
        told = wide and any(reasons)
        table = Table(box=None, pad_edge=False, expand=False)
        table.add_column("run", no_wrap=True, overflow="ellipsis")
        table.add_column("state", no_wrap=True)
        for title in ("step", "loss", "tokens/s", "left"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("loss so far", no_wrap=True)
        if told:
            table.add_column("why", no_wrap=True, overflow="ellipsis")
        for name, one, reason in zip(self.names, runs, reasons, strict=True):
            row = one.row
            loss, rate = one.last.get("loss"), one.last.get("tokens_per_s")
            cells = [
                Text(name),
                Text(row.state, style=_STYLES.get(row.state, "yellow")),
                Text(f"{one.last.get('step', 0):,}/{'?' if row.steps is None else format(row.steps, ',')}"),
                Text("" if loss is None else f"{loss:.4f}"),
                Text("" if rate is None else format_count(rate)),
                Text("" if one.seconds_left is None else format_duration(one.seconds_left)),
                Text(sparkline(one.losses, 40 if wide else 16), style="cyan"),
            ]
            table.add_row(*cells, *([Text(reason)] if told else []))
        return table


def _figures(loss: float | None, rate: float | None) -> list[str]:
    found = [] if loss is None else [f"loss {loss:.4f}"]
    return found if rate is None else [*found, f"{format_count(rate)} tokens/s"]
