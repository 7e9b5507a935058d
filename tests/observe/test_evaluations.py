"""What `tplaunch eval` finds of a run's checkpoint, in the run's W&B run: real files, and what a server is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.observe.fake_wandb import KEY, serving
from tests.observe.test_wandb import RECIPE, environment, read_back
from tplaunch.observe.wandb import run_id
from tplaunch.recipe.load import dump_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir

RECORDS = [
    {"step": 7, "time": 1e9, "data": "texts/held out.txt", "kind": "text", "loss": 2.5, "bits_per_byte": 1.25},
    {"step": 7, "time": 1e9, "data": "quiz.jsonl", "kind": "choices", "acc": 0.5, "acc_norm": 0.25, "questions": 8},
]
EXPECTED = {
    "eval/held-out/loss": 2.5,
    "eval/held-out/bits_per_byte": 1.25,
    "eval/quiz/acc": 0.5,
    "eval/quiz/acc_norm": 0.25,
    "train/step": 7,
    "train/tokens": 700,
}
SEND = """
import json, sys
from pathlib import Path
from tplaunch.observe import wandb
from tplaunch.observe.evaluations import send_evaluations
from tplaunch.run.directory import RunDir

wandb.INIT_TIMEOUT_S = float(sys.argv[2])
print(send_evaluations(RunDir(Path(sys.argv[1])), json.load(sys.stdin)))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was mirrored to W&B."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.metrics.write_text("".join(json.dumps({"step": s, "time": 1e9, "tokens": 100 * s}) + "\n" for s in (1, 7, 9)))
    run_id(run)
    return run


def send(run: RunDir, mode: str, timeout_s: float = 10.0, **env: str) -> str:
    recipe = Recipe.model_validate({**RECIPE, "logging": {"wandb": {"mode": mode}}})
    run.recipe.write_text(dump_recipe(recipe))
    done = subprocess.run(
        [sys.executable, "-c", SEND, str(run.root), str(timeout_s)],
        input=json.dumps(RECORDS),
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def of_interest(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def test_offline_the_results_are_a_part_of_the_run(run: RunDir) -> None:
    assert send(run, "offline") == ""
    (folder,) = run.wandb.glob("offline-run-*")
    records = read_back(folder)
    assert folder.name.endswith(run_id(run))
    assert [of_interest(row["item"]) for row in records["history"]] == [EXPECTED]


def test_online_the_run_is_joined_and_not_ended(run: RunDir) -> None:
    with serving() as server:
        assert send(run, "online", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url) == ""
        assert {one["name"] for one in server.sent.runs} == {run_id(run)}
        assert [of_interest(row) for row in server.sent.lines("wandb-history.jsonl")] == [EXPECTED]
        assert server.sent.exit_codes == []


def test_a_run_without_wandb_is_left_alone(run: RunDir) -> None:
    assert send(run, "disabled") == ""
    (run.wandb / "run-id").unlink()
    assert send(run, "offline") == ""
    assert os.listdir(run.wandb) == []
