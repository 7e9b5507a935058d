"""What the console shows, from a run directory as its processes write it."""

from __future__ import annotations

import io
import re
import shlex
import time
from pathlib import Path

import pytest
from rich.console import Console

from tplaunch.check.recipe import Checked
from tplaunch.files import append_line
from tplaunch.launch.console import RunView, print_summary
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import LossSpiked, Resumed, RolledBack, Sampled, Saved, SaveFailed, Skipped, Straggled
from tplaunch.run.metrics import MetricsLog
from tplaunch.sparkline import sparkline
from tplaunch.spec.resolve import resolve

RECIPE = {
    "name": "tiny",
    "model": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 128, "vocab_size": 512},
    "topology": {"tp": 2, "pp": 2, "dp": 2, "stage_layers": [3, 1]},
    "training": {"seq_len": 32, "global_batch_size": 8, "steps": 100, "precision": "fp32"},
    "data": {"train": "corpus"},
}
CHECKED = Checked(resolve(Recipe.model_validate(RECIPE)), [])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def record(step: int, at: float | None = None, **more: float | None) -> dict[str, float | None]:
    figures = {"loss": 10 / step, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 1234.0, "step_time_s": 2.0}
    return {"step": step, "time": time.time() if at is None else at, **figures, **more}


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, markup=False, highlight=False), out


def test_describe() -> None:
    assert CHECKED.describe() == (
        "tp 2 x pp 2 x dp 2 = 8 ranks, layers 3+1 by 1f1b; 229.95K parameters in fp32; 8 x 32 tokens a step, 100 steps"
    )


def test_a_line_a_record_where_there_is_no_terminal(run: RunDir) -> None:
    append_line(run.metrics, record(50, at=1e9))  # of an earlier launch
    run.append(Saved(step=1))
    to, out = console(terminal=False)
    view = RunView(CHECKED, run, to)
    run.append(Resumed(step=4))
    log = MetricsLog(run)
    log.truncate_after(4)
    log.append(record(5))
    view.update()
    log.append(record(6, at=time.time() + 3, mfu=0.412, **{"validation/loss": 2.5}))
    run.append(Saved(step=6, path="p"))
    run.append(SaveFailed(step=7, why="disk full"))
    run.append(LossSpiked(step=8, loss=9.0, median=2.25))
    run.append(RolledBack(step=8, checkpoint=6))
    run.append(Sampled(step=8, count=3, seconds=1.5, prompt="ROMEO:", text="\n\x1b[2JBut, \u202esoft!  " + "a " * 80))
    view.update()
    view.close()
    _, _, *lines = out.getvalue().splitlines()
    assert lines[:2] == [
        "resumed after step 4",
        "step 5/100  loss 2.0000  grad_norm 0.5000  lr 1.00e-03  1.23K tokens/s  3m10s left",
    ]
    assert lines[2:4] == ["checkpoint of step 6", "checkpoint of step 7 failed, training goes on: disk full"]
    assert lines[4] == "loss 9.0000 at step 8 is a spike: the median before it is 2.2500"
    assert lines[5] == "back to the state of step 6 after step 8; its data are skipped"
    soft = "But, soft! " + "a " * 36 + "a"
    assert lines[6] == f"step 8 writes: ROMEO: | [2J{soft}... (2 more in samples.jsonl)"
    assert lines[7].startswith("step 6/100  loss 1.6667  validation 2.5000  grad_norm 0.5000")
    assert "MFU 41.2%" in lines[7]
    assert len(lines) == 8


def test_steps_that_are_trained_again_are_shown_again(run: RunDir) -> None:
    to, out = console(terminal=False)
    view = RunView(CHECKED, run, to)
    log = MetricsLog(run)
    for step in (1, 2, 3):
        log.append(record(step))
    view.update()
    log.truncate_after(1)
    log.append(record(2, loss=None))
    view.update()
    shown = [line.split("  ")[:2] for line in out.getvalue().splitlines() if line.startswith("step")]
    assert [step for step, _ in shown] == ["step 1/100", "step 2/100", "step 3/100", "step 2/100"]
    assert shown[-1][1] == "loss not finite"


def test_live_on_a_terminal(run: RunDir) -> None:
    to, out = console(terminal=True)
    view = RunView(CHECKED, run, to)
    view.update()
    assert "starting 8 processes" in out.getvalue() and "tiny" in out.getvalue()
    MetricsLog(run).append(record(25, **{"validation/loss": 3.25}))
    run.append(Saved(step=25, path="p"))
    view.close()
    last = out.getvalue()[out.getvalue().rindex("tiny") :]
    for text in ("step 25/100", "25 %", "2m30s left", "loss 0.4000", "validation 3.2500 (step 25)", "checkpoint 25"):
        assert text in last


@pytest.mark.parametrize("width", [80, 200])
def test_a_curve_and_what_is_unusual_on_a_terminal_of_any_width(run: RunDir, width: int) -> None:
    out = io.StringIO()
    to = Console(file=out, force_terminal=True, width=width, markup=False, highlight=False, color_system=None)
    view, log = RunView(CHECKED, run, to), MetricsLog(run)
    for step in range(1, 65):
        more = {"mfu": 0.412, "tflops_per_gpu": 407.5, "memory_peak_gib": 61.23, "validation/loss": 4.0}
        log.append(record(step, at=view.started + step, **more))
    run.append(Resumed(step=50))
    for event in (Skipped(41), Skipped(44), Straggled(60, 3, 0, 1, 1, 0, 1.62), SaveFailed(60, "full")):
        run.append(event)
    view.update()
    run.append(Saved(step=61, path="p"))
    view.close()
    picture = out.getvalue()[out.getvalue().rindex("step 64/100") :].splitlines()
    assert all(len(line) <= width for line in picture)
    assert picture[1].startswith("loss 0.1562 \u2588") and picture[1].count("\u2581") > 8
    shown = " ".join(picture[1:])
    for text in ("\u2581  validation 4.0000 (step 64)  grad_norm", "MFU 41.2%  memory 61.2 GiB", "checkpoint 61"):
        assert text in shown
    assert "TFLOP" not in shown
    unusual = "unusual: 2 steps skipped, the last 44; rank 3 (node 0) slow, 1.62 x the median at step 60"
    assert unusual in re.sub(r"\s+", " ", shown), "the checkpoint that failed has been made up for"
    assert len(picture) - 1 == (5 if width == 80 else 3), "and the cursor, shown again"


def test_a_line_names_what_a_gpu_does_where_its_peak_is_not_known(run: RunDir) -> None:
    to, out = console(terminal=False)
    view = RunView(CHECKED, run, to)
    append_line(run.metrics, record(5, at=view.started + 5, tflops_per_gpu=0.01234, memory_peak_gib=2.04))
    view.close()
    line = out.getvalue().splitlines()[-1]
    assert line.startswith("step 5/100") and "1.23K tokens/s  0.0123 TFLOP/s a rank  memory 2.0 GiB  " in line


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([3.0], 8, "\u2581"),
        ([7.0, 6, 5, 4, 3, 2, 1, 0], 8, "".join(map(chr, range(0x2588, 0x2580, -1)))),
        ([0.0, 2.0, 7.0, 7.0], 2, "\u2581\u2588"),
        ([0.0, None, 7.0], 8, "\u2581\u00d7\u2588"),
        ([0.0, 1.0, float("nan"), 7.0, 5.0, 5.0], 3, "\u2581\u00d7\u2588"),
        ([2.0, 2.0], 8, "\u2581\u2581"),
    ],
)
def test_sparkline(values: list[float | None], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_summary(run: RunDir) -> None:
    append_line(run.metrics, record(10, **{"validation/loss": 3.0}))
    append_line(run.metrics, record(20))
    (run.wandb / "offline-run-20260101_000000-abc").mkdir()
    (run.checkpoints / "step-00000020").mkdir()
    to, out = console(terminal=False)
    print_summary(to, run, 75.0)
    text = out.getvalue()
    for line in (
        f"run         {run.root}",
        "step        20",
        "loss        0.5000",
        "validation  3.0000",
        "time        1m15s",
        f"watch       wandb leet {run.wandb}",
        f"upload      wandb sync {run.wandb}/offline-run-*",
        f'generate    tplaunch generate {run.root} -p "..."',
        f"export      tplaunch export {run.root} FOLDER  # for transformers, vLLM and others",
    ):
        assert line + "\n" in text


def test_commands_can_be_pasted_and_bad_lines_are_counted(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run's")
    run.create()
    append_line(run.metrics, record(10))
    append_line(run.metrics, {**record(20), "loss": "low"})
    append_line(run.metrics, {"step": 30})
    (run.wandb / "offline-run-20260101_000000-abc").mkdir()
    (run.checkpoints / "step-00000030").mkdir()
    to, out = console(terminal=False)
    print_summary(to, run, 75.0)
    lines = dict(line.split(maxsplit=1) for line in out.getvalue().splitlines() if not line.startswith(" "))
    assert (lines["step"], lines["loss"]) == ("30", "1.0000")
    assert lines["metrics"] == f"1 line of {run.metrics} left out: not records"
    for label in ("watch", "upload", "generate", "export"):
        assert str(run.root) in " ".join(shlex.split(lines[label], comments=True)), label


def test_a_view_takes_no_offence_at_a_line_that_is_no_record(run: RunDir) -> None:
    to, out = console(terminal=False)
    view = RunView(CHECKED, run, to)
    for bad in ({"loss": "low"}, {"time": "now"}, {"lr": "x"}, {"step": None}):
        append_line(run.metrics, {**record(5), **bad})
    append_line(run.metrics, {"step": 6, "time": time.time(), "lr": None, "loss": None})
    view.update()
    view.close()
    assert [line for line in out.getvalue().splitlines() if "step " in line] == ["step 6/100  loss not finite"]


def test_summary_of_nothing(run: RunDir) -> None:
    to, out = console(terminal=False)
    print_summary(to, run, 1.0)
    assert "loss" not in out.getvalue() and "generate" not in out.getvalue() and "wandb" not in out.getvalue()
