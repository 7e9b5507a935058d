"""Branches: a new run that goes on from a step of another (`--from RUN@STEP`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import work_in
from tplaunch.checkpoint.store import list_checkpoints, read_manifest
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit
from tplaunch.launch.branch import branch_of
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Branched, Resumed

RECIPE = """
name: trunk
model: {hidden_size: 32, num_layers: 1, num_heads: 4, ffn_hidden_size: 64, vocab_size: 300}
topology: {dp: 1}
training: {seq_len: 16, global_batch_size: 2, steps: 6, precision: fp32}
optimizer: {lr: 1.0e-3}
lr_schedule: {warmup_steps: 2, decay: constant}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
checkpoint: {every: 2, keep: 9}
logging: {every: 1, wandb: {mode: disabled}}
"""
DECAYED = ("lr_schedule.decay=wsd", "lr_schedule.decay_steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of six steps, saved at every second."""
    folder = tmp_path_factory.mktemp("trunk")
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch, RECIPE)
        patch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
        assert tplaunch(["train", "tiny.yaml"]) == Exit.DONE
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
    return folder


def branch(name: str, parent: str, *settings: str, verb: str = "train", more: tuple[str, ...] = ()) -> int:
    """The exit code of a branch; `command` makes all of it ready but the ranks."""
    sets = [word for setting in (f"name={name}", *settings) for word in ("--set", setting)]
    return tplaunch([verb, "tiny.yaml", "--from", parent, *sets, *more])


def losses(name: str) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and rate of each step of a run."""
    return {
        one["step"]: (one["loss_last"], one["grad_norm"], one["lr"])
        for one in RunDir(Path("runs") / name).read_metrics()
    }


def test_a_branch_of_the_same_recipe_repeats_its_trunk(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch("again", "trunk@4") == Exit.DONE
    assert f"branch: goes on from trunk@4, {here}/runs/trunk/checkpoints/step-00000004" in capsys.readouterr().err
    trunk, again = losses("trunk"), losses("again")
    assert sorted(again) == [5, 6]
    assert all(again[step] == trunk[step] for step in again), "bit for bit"
    run = RunDir(here / "runs/again")
    events = run.history().events
    (begun,) = [event for event in events if isinstance(event, Branched)]
    assert (begun.parent, begun.step) == (str(here / "runs/trunk"), 4)
    assert [event.step for event in events if isinstance(event, Resumed)] == [4]
    own, trunks = (read_manifest(root / "checkpoints/step-00000006") for root in (run.root, here / "runs/trunk"))
    assert own.about["parent"] == str(here / "runs/trunk") and own.about["parent_step"] == 4
    assert "parent" not in trunks.about
    assert own.state["progress"] == trunks.state["progress"]
