"""Hugging Face folders beside checkpoints: whole or absent, in nobody's way, and gone with their checkpoint."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.checkpoint.test_store import write
from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World
from tplaunch.checkpoint.store import export_path, retire, set_aside, sweep
from tplaunch.worker import export_saved


def going(raw: dict[str, Any], root: str) -> list[torch.Tensor]:
    """Train, save every second step, and export every fourth; the norm's weights after each fourth."""
    made = trainer(raw, root)
    made.checkpoints.export = export_saved
    found = []
    for step in range(1, 9):
        made.step.run(batch(made))
        if step % 2 == 0:
            made.save(wait=False)
        if step % 4 == 0:
            shards = made.step.stages[0].sharding.shards
            found += [one.layout.full_tensor().clone() for one in shards if one.name == "norm.weight"]
    made.checkpoints.finish()
    return found


def events(root: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def test_folders_are_whole_and_go_with_their_checkpoints(world: World, tmp_path: Path) -> None:
    raw = {**case(2), "checkpoint": {"every": 2, "export_every": 4, "keep": 2}}
    norms = world.run(2, going, raw, str(tmp_path))[0]
    assert [one["step"] for one in events(tmp_path, "export")] == [4, 8]
    here = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert here == {"step-00000006", "step-00000008", "step-00000008.hf"}
    folder = tmp_path / "checkpoints" / "step-00000008.hf"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert torch.equal(load_file(folder / "model.safetensors")["model.norm.weight"], norms[1])
    assert not torch.equal(norms[0], norms[1])


def stuck(raw: dict[str, Any], root: str) -> list[Any]:
    """Whether training went on while a folder was being made; a folder that cannot be made."""
    made = trainer(raw, root)
    go_on, begun = threading.Event(), threading.Event()

    def slow(checkpoint: Path, out: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        raise OSError("no room")

    made.checkpoints.export = slow
    made.step.run(batch(made))
    made.save(wait=False)
    assert begun.wait(60)
    made.step.run(batch(made))
    stall = made.checkpoints.take_timings()["checkpoint/stall_s"]
    go_on.set()
    made.checkpoints.finish()
    return [made.progress.step, stall, made.checkpoints.saved_step]


def test_training_goes_on_meanwhile_and_after_a_failure(world: World, tmp_path: Path) -> None:
    raw = {**case(), "checkpoint": {"export_every": 1, "every": 1}}
    ((step, stall, saved),) = world.run(1, stuck, raw, str(tmp_path))
    assert (step, saved) == (2, 1) and stall < 5
    (failed,) = events(tmp_path, "export_failed")
    assert failed["step"] == 1 and failed["why"] == "OSError: no room"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_they_are_kept_and_set_aside_with_their_checkpoint(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        export_path(write(tmp_path, step)).mkdir()
    (tmp_path / "step-00000030.hf.tmp").mkdir()
    sweep(tmp_path)
    retire(tmp_path, saved=20, keep=1, stays=lambda step: False)
    set_aside(tmp_path, after=20)
    names = ["step-00000020", "step-00000020.hf", "step-00000030.abandoned", "step-00000030.abandoned.hf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
