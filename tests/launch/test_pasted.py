"""What `tplaunch command` prints, pasted: on several nodes, beside another launch, with a broken recipe."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import work_in
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit
from tplaunch.run.directory import RunDir

RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 2, num_heads: 4, ffn_hidden_size: 64, vocab_size: 300}
topology: {tp: 2, dp: 2, nodes: 2}
training: {seq_len: 16, global_batch_size: 4, steps: 2, precision: fp32}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
logging: {wandb: {mode: disabled}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, RECIPE)


def test_two_nodes_train(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["command", "tiny.yaml"]) == Exit.DONE
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in words[: words.index(sys.executable)])
    argv = words[words.index(sys.executable) :]
    # Both nodes are this machine, known by two names; they meet at a free port.
    argv[argv.index("--rdzv-endpoint") + 1] = "127.0.0.1:29517"
    nodes = [
        subprocess.Popen(
            [*argv[: argv.index("-m", 3)], "--local-addr", "127.0.0.1", *argv[argv.index("-m", 3) :]],
            env={**os.environ, **settings, "SLURMD_NODENAME": name, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("first", "second")
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    run = RunDir(here / "runs/tiny")
    said = [path.read_text() for path in run.logs.glob("attempt-1/*.log")]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join([*outputs, *said])
    assert run.history().steps_done == 2
    assert [record["step"] for record in run.read_metrics()] == [1, 2]


def worker(run: RunDir, **environment: str) -> subprocess.CompletedProcess[str]:
    """Rank 0 of a launch that no launcher watches."""
    return subprocess.run(
        [sys.executable, "-m", "tplaunch.worker", str(run.root)],
        env={**os.environ, "TPLAUNCH_ATTEMPT": "1", "RANK": "0", "LOCAL_RANK": "0", **environment},
        timeout=60,
    )


def test_a_pasted_launch_holds_the_run_directory(here: Path) -> None:
    run = RunDir(here / "run")
    run.create()
    with run.lock():
        assert worker(run).returncode == 1
    error = json.loads(run.rank_error(1, 0).read_text())
    assert "another launch is using" in error["message"] and f"process {os.getpid()} on" in error["message"]


def test_a_recipe_that_cannot_be_read_is_told_by_the_rank(here: Path) -> None:
    run = RunDir(here / "run")
    run.create()
    run.recipe.write_text("name: [broken\n")
    assert worker(run, TPLAUNCH_LOCKED="1").returncode == 1
    error = json.loads(run.rank_error(1, 0).read_text())
    assert error["type"] == "RecipeError" and "recipe.yaml:" in error["message"]


def test_a_rank_that_can_leave_no_beat_tells_what_ended_it_all_the_same(here: Path) -> None:
    run = RunDir(here / "run")
    run.create()
    run.beat(1, 0).mkdir(parents=True)
    assert worker(run, TPLAUNCH_LOCKED="1").returncode == 1
    error = json.loads(run.rank_error(1, 0).read_text())
    assert error["type"] == "RecipeError" and error["doing"] == "set-up"
