"""metrics.jsonl holds each step once, whatever happened between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tplaunch.run.directory import RunDir
from tplaunch.run.metrics import MetricsLog


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    return run


def steps(run: RunDir) -> list[int]:
    return [record["step"] for record in run.read_metrics()]


def test_resume_writes_no_step_twice(run: RunDir) -> None:
    log = MetricsLog(run)
    for step in range(1, 9):
        log.append({"step": step, "loss": 1 / step})
    resumed = MetricsLog(run)
    resumed.truncate_after(5)
    for step in range(6, 11):
        resumed.append({"step": step, "loss": 2 / step})
    assert steps(run) == list(range(1, 11))
    assert run.read_metrics()[4]["loss"] == 1 / 5
    assert run.read_metrics()[5]["loss"] == 2 / 6


def test_a_torn_last_line_is_dropped(run: RunDir) -> None:
    log = MetricsLog(run)
    log.append({"step": 1, "loss": 3.5})
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert steps(run) == [1]
    log.truncate_after(1)
    log.append({"step": 2, "loss": 3.25})
    assert run.metrics.read_text() == '{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.25}\n'


def test_nothing_to_drop_leaves_the_file_alone(run: RunDir) -> None:
    log = MetricsLog(run)
    log.truncate_after(5)
    assert not run.metrics.exists()
    log.append({"step": 1, "loss": 0.1 + 0.2})
    before = run.metrics.stat()
    log.truncate_after(1)
    assert run.metrics.stat().st_ino == before.st_ino


def test_from_the_start_again(run: RunDir) -> None:
    log = MetricsLog(run)
    log.append({"step": 1})
    log.truncate_after(0)
    assert steps(run) == []


def test_records_outlive_sigkill(run: RunDir) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from tplaunch.run.metrics import MetricsLog; from tplaunch.run.directory import RunDir\n"
        "log = MetricsLog(RunDir(Path(sys.argv[1])))\n"
        "for step in range(1, 11): log.append({'step': step})\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    assert subprocess.run([sys.executable, "-c", code, run.root], env=os.environ).returncode == -signal.SIGKILL
    assert steps(run) == list(range(1, 11))
