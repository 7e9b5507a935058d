"""`tplaunch wandb sync`, with a stand-in for wandb's command and with the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tplaunch.cli.main import run

FAKE = """#!/bin/sh
echo "$@" >> calls
case "$*" in *bad*) exit 1;; *silent*) exit 0;; *--dry-run*) exit 0;; esac
touch "$2/run-x.wandb.synced"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a `wandb` that notes how it is called."""
    program = tmp_path / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offline(place: Path, run_dir: str, name: str) -> str:
    path = place / "runs" / run_dir / "wandb" / f"offline-run-{name}"
    path.mkdir(parents=True)
    (path / "run-x.wandb").write_bytes(b":W&B")
    return f"runs/{run_dir}/wandb/offline-run-{name}"


def calls(place: Path) -> list[str]:
    file = place / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_all_runs_oldest_first_and_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = offline(place, "a", "20260103_000000-aaa")
    first = offline(place, "b", "20260101_000000-bbb")
    middle = offline(place, "a", "20260102_000000-aaa")
    assert run(["wandb", "sync", "--dry-run"]) == 0
    assert calls(place) == [f"sync --dry-run {path}" for path in (first, middle, last)]
    (place / "calls").unlink()
    assert run(["wandb", "sync"]) == 0
    assert calls(place) == [f"sync {path}" for path in (first, middle, last)]
    capsys.readouterr()
    assert run(["wandb", "sync"]) == 0
    assert len(calls(place)) == 3
    assert "nothing to send in runs/" in capsys.readouterr().out


def test_one_run_directory(place: Path) -> None:
    offline(place, "a", "20260101_000000-aaa")
    wanted = offline(place, "b", "20260102_000000-bbb")
    assert run(["wandb", "sync", "runs/b"]) == 0
    assert calls(place) == [f"sync {wanted}"]


@pytest.mark.parametrize("kind", ["bad", "silent"])
def test_a_failure_stops_the_order(place: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    failing = offline(place, "a", f"20260101_000000-{kind}")
    offline(place, "a", "20260102_000000-aaa")
    assert run(["wandb", "sync"]) == 1
    assert calls(place) == [f"sync {failing}"]
    assert f"{failing} was not sent" in capsys.readouterr().err


def test_no_wandb_is_a_usage_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offline(place, "a", "20260101_000000-aaa")
    monkeypatch.setenv("PATH", "")
    assert run(["wandb", "sync"]) == 2
    assert "no `wandb` command" in capsys.readouterr().err


def test_the_real_command_finds_what_a_run_left(tmp_path: Path) -> None:
    program = """
import sys, wandb
quiet = wandb.Settings(silent=True, console="off")
run = wandb.init(mode="offline", project="p", id="abc", dir=sys.argv[1], settings=quiet)
run.log({"loss": 1.0}, step=1)
run.finish()
"""
    (tmp_path / "wandb").mkdir()
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "tplaunch", "wandb", "sync", "--dry-run", str(tmp_path)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Would sync 1 run(s)" in done.stdout + done.stderr


def test_members_of_a_sweep_are_found(place: Path) -> None:
    offline(place, "sweep/0-lr", "20260101_000000-aaa")
    offline(place, "alone", "20260101_000001-bbb")
    from tplaunch.cli.wandb import waiting_runs

    found = waiting_runs(Path("runs"))
    assert [path.parts[1] for path in found] == ["sweep", "alone"]
