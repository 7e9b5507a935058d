"""`tplaunch wandb dashboard`: a workspace as JSON without an account, and saved by a server of the test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.observe.fake_wandb import KEY, serving
from tests.recipes import case, resolved
from tplaunch.recipe.load import dump_recipe
from tplaunch.run.directory import RunDir

pytest.importorskip("wandb_workspaces")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    raw = {**case(1, 2), "logging": {"wandb": {"project": "words"}}}
    run.recipe.write_text(dump_recipe(resolved(raw)))
    return run


def dashboard(run: RunDir, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "tplaunch", "wandb", "dashboard", str(run.root), *options],
        env={**kept, "NETRC": os.devnull, **environ},
        capture_output=True,
        text=True,
        timeout=60,  # W&B's own tries go on for many minutes
    )


def metrics(spec: dict[str, Any]) -> set[str]:
    """Names in a workspace that look like metrics."""
    return set(re.findall(r'"((?:[a-z]+/)[a-z0-9_]+)"', json.dumps(spec)))


def test_without_an_account_it_is_a_file(run: RunDir) -> None:
    done = dashboard(run)
    assert done.returncode == 0, done.stderr
    spec = json.loads((run.wandb / "dashboard.json").read_text())
    wanted = {"train/loss", "train/tokens", "throughput/mfu", "plan/mfu", "plan/bubble", "rank/heat_maps"}
    wanted |= {"memory/pp0_peak_gib", "memory/pp1_peak_gib", "checkpoint/stall_s"}
    assert wanted <= metrics(spec)


def test_its_metrics_are_those_that_are_documented(run: RunDir) -> None:
    dashboard(run)
    docs = (ROOT / "docs/watching.md").read_text()
    for name in metrics(json.loads((run.wandb / "dashboard.json").read_text())):
        group, _, key = name.partition("/")
        assert f"**`{group}/`**" in docs and re.search(rf"`{re.sub('pp[0-9]', 'pp0', key)}`", docs), name


def test_with_one_it_is_saved_in_the_project(run: RunDir) -> None:
    with serving() as server:
        done = dashboard(run, "--push", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        assert done.returncode == 0, done.stderr
        (view,) = server.sent.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("e", "words", "tplaunch")
    assert {"train/loss", "plan/mfu"} <= metrics(json.loads(view["spec"]))


def test_a_server_that_is_away_is_an_error_and_the_file_is_there(run: RunDir) -> None:
    done = dashboard(
        run, "--push", "-o", str(run.root / "w.json"), WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert done.returncode == 1 and "was not saved in W&B" in done.stderr
    assert metrics(json.loads((run.root / "w.json").read_text()))


def test_no_run_is_a_usage_error(tmp_path: Path) -> None:
    done = dashboard(RunDir(tmp_path))
    assert done.returncode == 2 and "is no run directory" in done.stderr
