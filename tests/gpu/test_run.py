"""The script that waits for a GPU, on the CPU: it runs, keeps what it finds, and a part that fails loses no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import run
from tests.gpu.run import Part, run_part

SCRIPT = Path(run.__file__)


def test_the_cpu_stands_in(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--cpu", "--only", "1b tplaunch,look tplaunch"],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["device"] == "cpu"
    parts = {part["part"]: part for part in found["parts"]}
    assert parts.keys() == {"1b tplaunch", "look tplaunch"}
    assert all(part["result"] == "passed" for part in parts.values())
    assert parts["1b tplaunch"]["figures"]["measured"]["tokens_per_s"] > 0
    assert any(line.startswith("train/step.py") for line in parts["look tplaunch"]["figures"]["measured"])
    assert "aten::mm" in (tmp_path / "profile-tiny-tplaunch.txt").read_text()
    assert done.stdout == (tmp_path / "table.txt").read_text()


def test_a_part_that_fails_or_hangs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "broken_part.py").write_text("print('why it failed')\nraise SystemExit(3)")
    failed = run_part(Part("broken", 60, ("broken_part",)), tmp_path, cpu=True, limit_s=60)
    assert (failed.result, failed.said) == ("failed", "why it failed")
    (tmp_path / "hung_part.py").write_text("import time\nprint('so far', flush=True)\ntime.sleep(600)")
    hung = run_part(Part("hung", 60, ("hung_part",)), tmp_path, cpu=True, limit_s=3)
    assert (hung.result, hung.said) == ("timed out", "so far")
    assert hung.seconds < 30


def test_wheels_are_all_but_the_machines_own() -> None:
    pytest.importorskip("tomllib")
    from tests.gpu.wheels import requirements

    names = [one.partition(">")[0] for one in requirements()]
    assert {"pydantic", "pyyaml", "rich", "typer", "pytest", "pytest-timeout", "hypothesis"} <= set(names)
    assert not {"torch", "wandb", "transformers"} & set(names)
