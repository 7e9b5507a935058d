"""Shows the progress of a run from the files of its run directory: on a terminal live, elsewhere a line a record."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.store import list_checkpoints
from tplaunch.files import Record, Tail, parse_lines
from tplaunch.run.directory import RunDir
from tplaunch.run.events import (
    CheckpointDamaged,
    CheckpointKept,
    EpochBegan,
    Evaluated,
    Event,
    ExportFailed,
    LossSpiked,
    Profiled,
    ProfileFailed,
    Resumed,
    RolledBack,
    Sampled,
    Saved,
    SaveFailed,
    Skipped,
    StageBegan,
    Started,
    Straggled,
    TensorboardFailed,
    WandbOpened,
    parse_event,
)
from tplaunch.run.records import parse_records
from tplaunch.sparkline import sparkline
from tplaunch.spec.validation import is_loss, losses
from tplaunch.units import format_count, format_duration

REDRAW_S = 0.25
_NAMED = 3  # corpora in a line
_PROMPT, _WRITTEN = 30, 90  # characters of a prompt, and of what the model adds, in a line


class RunView:
    """Follows one launch of a run.

    Args:
        checked: the recipe that runs.
        run_dir: its run directory. What is older than this view is not shown.
        console: where to draw.
    """

    def __init__(self, checked: Checked, run_dir: RunDir, console: Console) -> None:

        self.checked, self.run_dir, self.console = checked, run_dir, console
        self.metrics, self.events = Tail(run_dir.metrics), Tail(run_dir.events)
        self.events.read()  # those of earlier launches
        self.started = self.shown_until = time.time()
        self.phase = f"starting {checked.topology.world_size} processes"
        self.first: Record = {}
        self.last: Record = {}
        self.validation: dict[str, tuple[int, float]] = {}  # in words -> step, loss
        self.checkpoint: int | None = None
        self.losses: list[float | None] = []
        self.skipped = 0  # steps of this launch
        self.unusual: dict[type[Event], str] = {}  # the latest of each kind
        self.drawn = 0.0
        self.live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self.live = Live(console=console, auto_refresh=False)
            self.live.start()
        else:
            self.say(f"{checked.recipe.name}: {checked.describe()}")
            self.say(self.phase)

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, soft_wrap=True)

    def update(self) -> None:
        """Read what is new and show it."""
        for line in parse_lines(self.events.read(whole_lines=True)):
            if event := parse_event(line):
                self._event(event)
        for record in parse_records(self.metrics.read(whole_lines=True))[0]:
            # By time, not by step: a resumed run writes its old records anew, and trains some steps again.
            if (record.get("time") or 0) > self.shown_until:
                self._record(record)
        if self.live and time.monotonic() - self.drawn >= REDRAW_S:
            self.live.update(self._picture(), refresh=True)
            self.drawn = time.monotonic()

    def close(self) -> None:
        """Show what is new a last time, and leave it on the screen."""
        self.drawn = 0.0
        self.update()
        if self.live:
            self.live.stop()

    def _event(self, event: Event) -> None:
        if isinstance(event, (Saved, Resumed)):
            self.checkpoint = event.step
        self._note_unusual(event)
        if isinstance(event, (Started, Resumed)):
            self.phase = "running the first step"
        if (text := in_words(event)) and not (self.live and isinstance(event, Saved)):
            self.say(text)

    def _note_unusual(self, event: Event) -> None:
        match event:
            case Skipped(step=step):
                self.skipped += 1
                steps = "1 step" if self.skipped == 1 else f"{self.skipped} steps"
                self.unusual[Skipped] = f"{steps} skipped, the last {step}"
            case Straggled(step=step, rank=rank, node=node, ratio=ratio):
                self.unusual[Straggled] = f"rank {rank} (node {node}) slow, {ratio} x the median at step {step}"
            case LossSpiked(step=step):
                self.unusual[LossSpiked] = f"loss spike at step {step}"
            case SaveFailed(step=step):
                self.unusual[SaveFailed] = f"checkpoint {step} failed"
            case Saved():
                self.unusual.pop(SaveFailed, None)

    def _record(self, record: Record) -> None:
        self.shown_until = record["time"]
        self.losses.append(record.get("loss"))
        self.last = record
        self.first = self.first or record
        for key, words in losses(record).items():
            if record[key] is not None:
                self.validation[words] = record["step"], record[key]
        if not self.live:
            self.say("  ".join([f"step {record['step']}/{self._steps}", *_figures(record), *self._time_left()]))

    @property
    def _steps(self) -> int:
        return self.checked.recipe.training.steps

    def _time_left(self) -> list[str]:
        done = self.last["step"] - self.first["step"]
        elapsed = self.last["time"] - self.first["time"]
        seconds_per_step = elapsed / done if done > 0 else self.last.get("step_time_s")
        steps = self._steps - self.last["step"]
        known = steps > 0 and seconds_per_step is not None
        return [f"{format_duration(steps * seconds_per_step)} left"] if known else []

    def _picture(self) -> RenderableType:

        panel = Panel(self.checked.describe(), title=self.checked.recipe.name, title_align="left", expand=False)
        if not self.last:
            return Group(panel, f"{self.phase} ({format_duration(time.time() - self.started)})")
        width, step = self.console.width, self.last["step"]
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=self._steps, completed=step, width=min(60, max(10, width - 46))),
            f"step {step}/{self._steps}",
            f"{100 * step / self._steps:.0f} %",
            *self._time_left(),
        )
        figures = _figures({k: v for k, v in self.last.items() if not is_loss(k)})
        if "loss" in self.last and len(self.losses) > 1:
            figures[0] += f" {sparkline(self.losses, min(60, width // 4))}"
        figures[1:1] = [f"{words} {_number(loss)} (step {at})" for words, (at, loss) in self.validation.items()]
        if self.checkpoint is not None:
            figures.append(f"checkpoint {self.checkpoint}")
        lines = _lines(figures, width)
        unusual = [Text(f"unusual: {'; '.join(self.unusual.values())}", "yellow")] if self.unusual else []
        return Group(panel, bar, *lines, *unusual)


def _lines(items: Sequence[str], width: int) -> list[str]:
    """Items side by side, as many in a line as it holds: none is broken in two that fits in one."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(item)
    return lines


def evaluated(figures: Mapping[str, Any]) -> dict[str, str]:
    """Of each task of `eval` its figures, as text; of a file that anybody may have edited."""
    found: dict[str, str] = {}
    for key, value in figures.items():
        group, _, rest = key.partition("/")
        task, _, name = rest.rpartition("/")
        if group == "eval" and task and isinstance(value, (int, float)):
            found[task] = f"{found.get(task, task)} {name} {_number(value)}"
    return found


def in_words(event: Event) -> str:
    """What a launch says of an event; "" of those that need no word."""
    match event:
        case Resumed(step=step):
            return f"resumed after step {step}"
        case StageBegan(step=step, stage=stage, label=label):
            return f"stage {stage}{f' ({_one_line(label, _PROMPT)})' if label else ''} begins with step {step + 1}"
        case Saved(step=step):
            return f"checkpoint of step {step}"
        case SaveFailed(step=step, why=why):
            return f"checkpoint of step {step} failed, training goes on: {why}"
        case ExportFailed(step=step, why=why):
            return f"export of step {step} failed, training goes on: {why}"
        case CheckpointKept(path=path, why=why):
            return f"old checkpoint {path} could not be deleted and stays: {why}"
        case CheckpointDamaged(path=path, why=why):
            return f"checkpoint {path} is damaged and left out: {why}"
        case Skipped(step=step):
            return f"step {step} skipped: the loss or a gradient is not finite"
        case LossSpiked(step=step, loss=loss, median=median):
            return f"loss {_number(loss)} at step {step} is a spike: the median before it is {_number(median)}"
        case RolledBack(step=step, checkpoint=checkpoint):
            return f"back to the state of step {checkpoint} after step {step}; its data are skipped"
        case EpochBegan(step=step, corpora=corpora):
            return f"a further epoch begins with step {step}: {_epochs(corpora)}"
        case Evaluated(step=step, figures=figures):
            return f"step {step} evaluated: {'; '.join(evaluated(figures).values())}"
        case Sampled(step=step, count=count, prompt=prompt, text=text):
            more = f" ({count - 1} more in samples.jsonl)" if count > 1 else ""
            return f"step {step} writes: {_one_line(prompt, _PROMPT)} | {_one_line(text, _WRITTEN)}{more}"
        case Straggled(rank=rank, node=node, ratio=ratio):
            return f"rank {rank} (node {node}) holds the others up: {ratio} x the median"
        case Profiled(first=first, last=last, rank=rank, trace=trace, memory=memory):
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            more = f"; memory {memory} (docs.pytorch.org/memory_viz)" if memory else ""
            return f"profile of {steps} of rank {rank}: {trace} (ui.perfetto.dev){more}"
        case ProfileFailed(rank=rank, why=why):
            return f"rank {rank} could not be profiled, training goes on: {why}"
        case TensorboardFailed(why=why):
            return f"TensorBoard's files could not be written: {why}"
        case WandbOpened(mode=mode, problem=str(problem)):
            return f"W&B is {mode}: {problem}"
    return ""


def _one_line(text: str, most: int) -> str:
    """The beginning of a text that a model may have written: no line breaks, nothing that a terminal would obey."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def _epochs(corpora: list[Any]) -> str:
    """Corpora and their epochs, of a file that anybody may have edited; of many, the first ones."""
    names = [f"{one.get('path')} (epoch {one.get('epoch')})" for one in corpora if isinstance(one, dict)]
    more = [f"{len(names) - _NAMED:,} corpora more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])


def print_summary(console: Console, run_dir: RunDir, seconds: float) -> None:
    """What a finished or stopped launch leaves: figures, where they are, how to watch them, what to try next."""
    last = {key: value for record in run_dir.read_metrics() for key, value in record.items()}
    root, wandb = (shlex.quote(str(path)) for path in (run_dir.root, run_dir.wandb))
    lines = [("run", str(run_dir.root))]
    if last:
        lines += [("step", str(last["step"]))]
    if "loss" in last:
        lines += [("loss", _number(last["loss"]))]
    lines += [(words, _number(last[key])) for key, words in losses(last).items()]
    lines += [("time", format_duration(seconds))]
    if bad := run_dir.count_bad_metrics():
        lines += [("metrics", f"{bad} line{'s' * (bad > 1)} of {run_dir.metrics} left out: not records")]
    if any(run_dir.wandb.glob("*run-*-*")):
        lines += [("watch", f"wandb leet {wandb}")]
    if any(run_dir.wandb.glob("offline-run-*")):
        lines += [("upload", f"wandb sync {wandb}/offline-run-*")]
    if list_checkpoints(run_dir.checkpoints):
        lines += [("generate", f'tplaunch generate {root} -p "..."')]
        lines += [("export", f"tplaunch export {root} FOLDER  # for transformers, vLLM and others")]
    lines += [
        ("next", "the same command with --set training.steps=N trains on"),
        ("", "and with --set topology.tp=N goes on from the same checkpoint on another topology"),
    ]
    width = max(12, *(len(label) + 2 for label, _ in lines))
    for label, text in lines:
        console.print(f"{label:<{width}}{text}", soft_wrap=True)


def _figures(record: Record) -> list[str]:
    """The figures of a record that is there, as text."""
    shown = [
        ("loss", "loss {}", _number),
        *((key, f"{words} {{}}", _number) for key, words in losses(record).items()),
        ("grad_norm", "grad_norm {}", _number),
        ("lr", "lr {}", "{:.2e}".format),
        ("tokens_per_s", "{} tokens/s", format_count),
        ("mfu", "MFU {}", "{:.1%}".format),
        *([("tflops_per_gpu", "{} TFLOP/s a rank", "{:.3g}".format)] if record.get("mfu") is None else []),
        *([("memory_peak_gib", "memory {} GiB", "{:.1f}".format)] if record.get("memory_peak_gib") else []),
    ]
    there = [item for item in shown if item[0] in record and (record[item[0]] is not None or item[2] is _number)]
    return [text.format(form(record[key])) for key, text, form in there]


def _number(value: float | None) -> str:
    """A loss or a norm; null in the record is a number that was not finite."""
    return "not finite" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"
