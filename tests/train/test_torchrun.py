"""`tplaunch train` for real: torchrun processes, a run directory, kills and resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPOLOGIES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
SMALL = [
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "training.seq_len=64",
    "training.eval_every=0",
    "training.steps=20",
    "optimizer.lr=3e-4",  # a large rate throws the weights about at first: rounding errors grow tenfold in a step
    "lr_schedule.warmup_steps=4",
    "logging.every=1",
    "logging.wandb.mode=disabled",
]


def command(run_dir: Path, *settings: str) -> list[str]:
    sets = [word for setting in [*SMALL, *settings] for word in ("--set", setting)]
    return [sys.executable, "-m", "tplaunch", "train", "quickstart", "--run-dir", str(run_dir), *sets]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "TPLAUNCH_CACHE": str(cache), "NO_COLOR": "1"}


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def shape(tp: int, pp: int, dp: int) -> list[str]:
    return [f"topology.tp={tp}", f"topology.pp={pp}", f"topology.dp={dp}"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp64", 1e-9)])
def test_eight_topologies_one_curve(tmp_path: Path, cache: Path, precision: str, tolerance: float) -> None:
    curves = {}
    for tp, pp, dp in TOPOLOGIES:
        run_dir = tmp_path / f"{tp}{pp}{dp}"
        settings = [*shape(tp, pp, dp), f"training.precision={precision}", "checkpoint.every=0"]
        done = subprocess.run(command(run_dir, *settings), env=environment(cache), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        curves[tp, pp, dp] = curve(run_dir)
    reference = curves[1, 1, 1]
    assert [step for step, _, _ in reference] == list(range(1, 21))
    for place, found in curves.items():
        for ours, theirs in zip(found, reference, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance), place


def rank_pid(run_dir: Path, rank: int) -> int | None:
    """The process of a rank of the run, by its environment and command line."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tplaunch.worker" in words and str(run_dir).encode() in words and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    return None


def wait_for_step(run_dir: Path, step: int, launched: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and any(s >= step for s, _, _ in curve(run_dir)):
            return
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


@pytest.mark.slow
def test_killed_rank_is_named_and_the_run_resumes_bit_for_bit(tmp_path: Path, cache: Path) -> None:
    settings = [*shape(2, 2, 1), "checkpoint.every=5", "training.steps=16"]
    whole = tmp_path / "whole"
    done = subprocess.run(command(whole, *settings), env=environment(cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    run_dir = tmp_path / "killed"
    launched = subprocess.Popen(
        command(run_dir, *settings), env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(run_dir, 7, launched)
    pid = rank_pid(run_dir, 3)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = launched.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert launched.returncode == 1
    assert "Rank 3 failed (tp=1 dp=0 pp=1)" in output and "SIGKILL" in output and "Traceback" not in output
    assert all(rank_pid(run_dir, rank) is None for rank in range(4)), "orphans"

    done = subprocess.run(command(run_dir, *settings), env=environment(cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resume"] in ([5], [10])
    assert curve(run_dir) == curve(whole)


@pytest.mark.slow  # of small workers, and by SIGINT, tests/launch/test_local.py shows it
def test_sigterm_saves_and_asks_to_be_run_again(tmp_path: Path, cache: Path) -> None:
    settings = [*shape(1, 2, 2), "checkpoint.every=0", "training.steps=400"]
    run_dir = tmp_path / "run"
    launched = subprocess.Popen(
        command(run_dir, *settings), env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(run_dir, 3, launched)
    launched.send_signal(signal.SIGTERM)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 75, output
    last = curve(run_dir)[-1][0]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "stopped"] == [last]

    settings[-1] = f"training.steps={last + 2}"
    settings[0:3] = shape(2, 1, 1)  # on another topology
    done = subprocess.run(command(run_dir, *settings), env=environment(cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step, _, _ in curve(run_dir)] == list(range(1, last + 3))


def test_a_run_whose_reader_leaves_trains_to_its_end(tmp_path: Path, cache: Path) -> None:
    run_dir = tmp_path / "run"
    line = ["bash", "-c", '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}', "bash"]
    line += command(run_dir, *shape(1, 1, 1), "checkpoint.every=0", "training.steps=5")
    done = subprocess.run(line, env=environment(cache), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert [step for step, _, _ in curve(run_dir)] == [1, 2, 3, 4, 5]
    log = (run_dir / "logs/launch.log").read_text()
    assert "is lost (Broken pipe); the run goes on" in log and "step 5/5  loss" in log
    assert (run_dir / "checkpoints/step-00000005").is_dir()
