"""Runs watched while they go on."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.made_runs import make_run
from tplaunch.cli.views.run_watch import WatchView
from tplaunch.report import watch as module
from tplaunch.report.watch import Watched, watch
from tplaunch.run.directory import RunDir
from tplaunch.run.events import AttemptEnded

ATTEMPT = {"event": "attempt", "time": 5.0, "attempt": 1}


def add(run: RunDir, step: int, loss: float) -> None:
    record = {"step": step, "time": time.time(), "loss": loss, "tokens_per_s": 1000.0, "step_time_s": 2.0}
    with run.metrics.open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)
    monkeypatch.setattr(module, "STATES_S", 0.0)


def test_lines_where_nobody_looks(tmp_path: Path, quick: None) -> None:
    runs = [make_run(tmp_path / name, records=50, steps=100, events=[ATTEMPT]) for name in "ab"]
    out = io.StringIO()
    view = WatchView(Console(file=out, width=200, highlight=False, markup=False), ["a", "[b]"])
    locks = [run.lock() for run in runs]
    for lock in locks:
        lock.__enter__()
    looks = 0

    def show(watched: list[Watched]) -> None:
        nonlocal looks
        view.show(watched)
        looks += 1
        if looks == 1:
            add(runs[0], 51, 2.5)
        if looks == 2:
            add(runs[1], 51, 1.5)
            for run, lock in zip(runs, locks, strict=True):
                run.append(AttemptEnded(0, 1))
                lock.__exit__(None, None, None)

    watch(runs, show)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        *(["a", "step 50/100"], ["a", "running"], ["[b]", "step 50/100"], ["[b]", "running"]),
        *(["a", "step 51/100"], ["a", "done"], ["[b]", "step 51/100"], ["[b]", "done"]),
    ]
    assert lines[4].endswith("loss 2.5000  1.00K tokens/s")


def test_a_run_that_went_back_forgets_what_came_after(tmp_path: Path, quick: None) -> None:
    run = make_run(tmp_path / "a", records=0, steps=100, events=[ATTEMPT])
    for step in (1, 2, 3):
        add(run, step, float(step))
    seen: list[list[float]] = []

    def show(watched: list[Watched]) -> None:
        seen.append(list(watched[0].losses))
        if len(seen) == 1:
            kept = run.metrics.read_text().splitlines(keepends=True)[:1]
            (tmp_path / "new").write_text("".join(kept))
            (tmp_path / "new").replace(run.metrics)
            add(run, 2, 9.0)
        if len(seen) == 2:
            run.append(AttemptEnded(0, 1))

    run.lock_file.write_text('{"host": "elsewhere"}\n')
    run.beat(run.next_attempt(), 0).write_text("3 0 data\n")
    watch([run], show)
    assert seen == [[1.0, 2.0, 3.0], [1.0, 9.0], [1.0, 9.0]]


def test_ctrl_c_on_a_terminal_ends_it_cleanly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my-run", records=50, steps=100, events=[ATTEMPT])
    with run.lock():
        outer, inner = pty.openpty()
        environment = {**os.environ, "COLUMNS": "120", "LINES": "30", "TERM": "xterm"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tplaunch", "runs", "watch", str(run.root)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), inner),
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # else no Ctrl-C reaches it
        )
        os.close(inner)
        shown, deadline = b"", time.monotonic() + 60
        while b"50/100" not in shown and time.monotonic() < deadline:
            shown += os.read(outer, 65536)
        os.write(outer, b"\x03")
        try:
            while more := os.read(outer, 65536):
                shown += more
        except OSError:  # the other end is closed
            pass
        assert process.wait(timeout=30) == 0
    os.close(outer)
    text = shown.decode()
    assert "my-run" in text and "running" in text and "▁" in text and "Traceback" not in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
