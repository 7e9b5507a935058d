"""How a run goes, drawn from the files of its run directory: on a terminal live, elsewhere a line a record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tplaunch.arithmetic import parameter_count
from tplaunch.checkpoint.store import list_checkpoints
from tplaunch.rundir import Record, RunDir, parse_lines
from tplaunch.units import format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from tplaunch.check import Checked

REDRAW_S = 0.25


class Tail:
    """Reads what has been added to a file of JSON lines; one that was replaced is read from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = 0
        self.offset = 0

    def read(self) -> list[Record]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = self.path.stat().st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return parse_lines(whole)


class RunView:
    """Follows one launch of a run.

    Args:
        checked: the recipe that runs.
        run_dir: its run directory. What is older than this view is not shown.
        console: where to draw.
    """

    def __init__(self, checked: Checked, run_dir: RunDir, console: Console) -> None:
        from rich.live import Live

        self.checked, self.run_dir, self.console = checked, run_dir, console
        self.metrics, self.events = Tail(run_dir.metrics), Tail(run_dir.events)
        self.events.read()  # those of earlier launches
        self.started = self.shown_until = time.time()
        self.phase = f"starting {checked.topology.world_size} processes"
        self.first: Record = {}
        self.last: Record = {}
        self.validation: tuple[int, float] | None = None
        self.checkpoint: int | None = None
        self.drawn = 0.0
        self.live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self.live = Live(console=console, auto_refresh=False)
            self.live.start()
        else:
            self.say(f"{checked.recipe.name}: {describe(checked)}")
            self.say(self.phase)

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, soft_wrap=True)

    def update(self) -> None:
        """Reads what is new and shows it."""
        for event in self.events.read():
            self._event(event)
        for record in self.metrics.read():
            # By time, not by step: a resumed run writes its old records anew, and trains some steps again.
            if record["time"] > self.shown_until:
                self._record(record)
        if self.live and time.monotonic() - self.drawn >= REDRAW_S:
            self.live.update(self._picture(), refresh=True)
            self.drawn = time.monotonic()

    def close(self) -> None:
        """Shows what is new a last time, and leaves it on the screen."""
        self.drawn = 0.0
        self.update()
        if self.live:
            self.live.stop()

    def _event(self, event: Record) -> None:
        name, step = event["event"], event.get("step")
        if name == "resume":
            self.say(f"resumed after step {step}")
        elif name == "checkpoint":
            self.checkpoint = step
            if not self.live:
                self.say(f"checkpoint of step {step}")
        elif name == "checkpoint_failed":
            self.say(f"checkpoint of step {step} failed, training goes on: {event['why']}")
        elif name == "checkpoint_damaged":
            self.say(f"checkpoint {event['path']} is damaged and left out: {event['why']}")
        elif name == "skipped":
            self.say(f"step {step} skipped: the loss or a gradient is not finite")
        elif name == "loss_spike":
            loss, median = _number(event["loss"]), _number(event["median"])
            self.say(f"loss {loss} at step {step} is a spike: the median before it is {median}")
        elif name == "rollback":
            self.say(f"back to the state of step {event['checkpoint']} after step {step}; its data are skipped")
        elif name == "straggler":
            self.say(f"rank {event['rank']} (node {event['node']}) holds the others up: {event['ratio']} x the median")
        elif name == "wandb" and "problem" in event:
            self.say(f"W&B is {event['mode']}: {event['problem']}")
        if name in ("start", "resume"):
            self.phase = "running the first step"

    def _record(self, record: Record) -> None:
        self.shown_until = record["time"]
        self.last = record
        self.first = self.first or record
        if record.get("validation/loss") is not None:
            self.validation = (record["step"], record["validation/loss"])
        if not self.live:
            self.say("  ".join([f"step {record['step']}/{self._steps}", *_figures(record), *self._time_left()]))

    @property
    def _steps(self) -> int:
        return self.checked.recipe.training.steps

    def _time_left(self) -> list[str]:
        done = self.last["step"] - self.first["step"]
        elapsed = self.last["time"] - self.first["time"]
        seconds_per_step = elapsed / done if done > 0 else self.last["step_time_s"]
        steps = self._steps - self.last["step"]
        return [f"{format_duration(steps * seconds_per_step)} left"] if steps > 0 else []

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        panel = Panel(describe(self.checked), title=self.checked.recipe.name, title_align="left", expand=False)
        if not self.last:
            return Group(panel, f"{self.phase} ({format_duration(time.time() - self.started)})")
        bar = Table.grid(padding=(0, 2))
        step = self.last["step"]
        bar.add_row(
            ProgressBar(total=self._steps, completed=step, width=40),
            f"step {step}/{self._steps}",
            f"{100 * step / self._steps:.0f} %",
            *self._time_left(),
        )
        figures = _figures({k: v for k, v in self.last.items() if k != "validation/loss"})
        if self.validation:
            figures.append(f"validation {_number(self.validation[1])} (step {self.validation[0]})")
        if self.checkpoint is not None:
            figures.append(f"checkpoint {self.checkpoint}")
        return Group(panel, bar, "  ".join(figures))


def describe(checked: Checked) -> str:
    """Topology, model and batch in words."""
    recipe, topology = checked.recipe, checked.topology
    training, layout = recipe.training, recipe.topology
    where = f" on {topology.nodes} nodes" if topology.nodes > 1 else ""
    split = f", layers {'+'.join(map(str, checked.stage_layers))} by {layout.schedule}" if topology.pp > 1 else ""
    return (
        f"tp {topology.tp} x pp {topology.pp} x dp {topology.dp} = {topology.world_size} ranks{where}{split}; "
        f"{format_count(parameter_count(recipe.model))} parameters in {training.precision}; "
        f"{training.global_batch_size} x {training.seq_len} tokens a step, {format_count(training.steps)} steps"
    )


def print_summary(console: Console, run_dir: RunDir, seconds: float) -> None:
    """What a finished or stopped launch leaves: figures, where they are, how to watch them, what to try next."""
    last = {key: value for record in run_dir.read_metrics() for key, value in record.items()}
    lines = [("run", str(run_dir.root))]
    if last:
        lines += [("step", str(last["step"])), ("loss", _number(last["loss"]))]
    if "validation/loss" in last:
        lines += [("validation", _number(last["validation/loss"]))]
    lines += [("time", format_duration(seconds))]
    if any(run_dir.wandb.glob("*run-*-*")):
        lines += [("watch", f"wandb leet {run_dir.wandb}")]
    if any(run_dir.wandb.glob("offline-run-*")):
        lines += [("upload", f"wandb sync {run_dir.wandb}/offline-run-*")]
    if list_checkpoints(run_dir.checkpoints):
        lines += [("generate", f'tplaunch generate {run_dir.root} -p "..."')]
        lines += [("export", f"tplaunch export {run_dir.root} FOLDER, for transformers, vLLM and others")]
    lines += [
        ("next", "the same command with --set training.steps=N trains on"),
        ("", "and with --set topology.tp=N goes on from the same checkpoint on another topology"),
    ]
    for label, text in lines:
        console.print(f"{label:<12}{text}", soft_wrap=True)


def _figures(record: Record) -> list[str]:
    """The figures of a record that is there, as text."""
    shown = [
        ("loss", "loss {}", _number),
        ("validation/loss", "validation {}", _number),
        ("grad_norm", "grad_norm {}", _number),
        ("lr", "lr {}", "{:.2e}".format),
        ("tokens_per_s", "{} tokens/s", format_count),
        ("mfu", "MFU {}", "{:.1%}".format),
    ]
    return [text.format(form(record[key])) for key, text, form in shown if key in record]


def _number(value: float | None) -> str:
    """A loss or a norm; null in the record is a number that was not finite."""
    return "not finite" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"
