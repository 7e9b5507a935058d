"""Saving and loading through a real trainer: what goes wrong, and what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import trainer
from tests.world import World
from tplaunch.checkpoint.metadata import read_metadata
from tplaunch.checkpoint.store import read_manifest
from tplaunch.cli.main import run
from tplaunch.spec.checkpoint import checkpoint_bytes

TINY = case(model={"num_layers": 1, "hidden_size": 32}, training={"steps": 4})


def save_all(raw: dict[str, Any], root: str, steps: list[int]) -> tuple[int, list[dict[str, float]]]:
    """Save the fresh model at these steps; the estimated bytes, and what each save cost."""
    made = trainer(raw, root)
    timings = []
    for step in steps:
        made.progress.step = step
        made.save(wait=True)
        timings.append(made.checkpoints.take_timings())
    return checkpoint_bytes(made.checkpoints.recipe), timings


def save_without_room(raw: dict[str, Any], root: str) -> None:
    made = trainer(raw, root)
    made.progress.step = 1
    made.save(wait=True)
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=1000)  # type: ignore[assignment]
    try:
        made.progress.step = 2
        made.save(wait=True)
    finally:
        shutil.disk_usage = real
    made.progress.step = 3
    made.save(wait=True)


def device_of_the_saving_thread(raw: dict[str, Any], root: str) -> list[tuple[str, int]]:
    """(thread, GPU) that each thread was set to, on a rank whose GPU is its node's fourth."""
    import threading

    import torch

    made = trainer(raw, root)
    made.progress.step = 1
    taken: list[tuple[str, int]] = []
    torch.cuda.is_initialized = lambda: True  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 3  # type: ignore[assignment]
    torch.cuda.set_device = lambda gpu: taken.append((threading.current_thread().name, gpu))  # type: ignore[assignment]
    made.save(wait=True)
    return taken


def load(raw: dict[str, Any], root: str, source: str = "auto") -> tuple[int | None, str]:
    """(the step resumed from, the error)."""
    from tplaunch.errors import TplaunchError

    made = trainer(raw, root)
    try:
        made.resume(source)
    except TplaunchError as error:
        return None, str(error)
    return made.progress.step, ""


def events(root: Path, name: str) -> list[dict[str, Any]]:
    return [e for line in (root / "events.jsonl").read_text().splitlines() if (e := json.loads(line))["event"] == name]


def test_the_saving_thread_stays_on_its_ranks_gpu(tmp_path: Path, world: World) -> None:
    (taken,) = world.run(1, device_of_the_saving_thread, TINY, str(tmp_path))
    assert taken == [("checkpoint", 3)]


def test_what_a_save_records_and_the_commands_show(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {**TINY, "topology": {"tp": 2, "dp": 1}, "checkpoint": {"keep": 2}}
    (estimate, timings), (_, others) = world.run(2, save_all, two, str(tmp_path), [1, 2, 3])
    for timing in timings:
        assert 0 < timing["checkpoint/save_s"] <= timing["checkpoint/stall_s"]  # it was waited for
    assert set(others[0]) == {"checkpoint/stall_s"}
    newest = tmp_path / "checkpoints" / "step-00000003"
    manifest = read_manifest(newest)
    data = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".distcp"))
    assert estimate <= data <= estimate * 1.3 + 200_000  # each tensor is pickled with a header of about 1 KB
    assert manifest.state["progress"]["step"] == 3
    assert manifest.about["wandb_id"] == (tmp_path / "wandb" / "run-id").read_text().strip()

    assert run(["checkpoint", "list", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0][-13:] for line in said] == ["step-00000002", "step-00000003"]
    assert all(line.endswith("complete") for line in said)
    assert run(["checkpoint", "inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "tp=2" in said and "hidden_size=32" in said and manifest.about["torch"] in said
    assert run(["checkpoint", "inspect", str(newest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["about"] == manifest.about
    assert run(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("whole") == 2

    shard = next(newest.glob("__0_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run(["checkpoint", "list", str(newest)]) == 0
    assert "complete" in capsys.readouterr().out
    assert run(["checkpoint", "verify", str(newest)]) == 1
    assert f"{shard} does not match its checksum" in capsys.readouterr().out
    assert run(["checkpoint", "verify", str(tmp_path), "--json"]) == 1
    assert [len(report["damage"]) for report in json.loads(capsys.readouterr().out)] == [0, 1]

    # a damaged newest one is reported and passed over; none whole is an error
    assert world.run(1, load, TINY, str(tmp_path))[0] == (2, "")
    assert events(tmp_path, "checkpoint_damaged")[0]["path"] == str(newest)
    (newest.parent / "step-00000002" / "manifest.json").unlink()
    assert run(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)
    assert "manifest.json cannot be read" in first["damage"][0]
    assert run(["checkpoint", "inspect", first["path"]]) == 1
    step, error = world.run(1, load, TINY, str(tmp_path))[0]
    assert step is None
    assert "step-00000002" in error and "step-00000003" in error and "--run-dir" in error


def test_a_full_disk_leaves_training_and_older_checkpoints(world: World, tmp_path: Path) -> None:
    world.run(2, save_without_room, {**TINY, "topology": {"tp": 1, "dp": 2}}, str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]
    (failed,) = events(tmp_path, "checkpoint_failed")
    assert failed["step"] == 2
    assert "1000 B free" in failed["why"]
    assert run(["checkpoint", "verify", str(tmp_path)]) == 0


def test_a_checkpoint_of_another_model_is_refused_in_words(world: World, tmp_path: Path) -> None:
    sgd = {**TINY, "optimizer": {"name": "sgd"}}
    world.run(1, save_all, sgd, str(tmp_path), [1])
    other = {**TINY, "model": {**TINY["model"], "num_layers": 2, "qk_norm": True, "rope_theta": 5e5}}
    ((step, error),) = world.run(1, load, other, str(tmp_path))
    assert step is None
    assert "model.num_layers: " in error and "num_layers=1, the recipe 2" in error and "qk_norm" in error
    assert "rope_theta=10000.0, the recipe 500000.0" in error  # fixes no shape, but what the weights mean
    assert "exp_avg, exp_avg_sq" in error
    assert world.run(1, load, {**sgd, "training": {**sgd["training"], "steps": 9}}, str(tmp_path)) == [(1, "")]


def test_what_muon_keeps_is_no_other_optimizers(world: World, tmp_path: Path) -> None:
    """Of matrices it is a momentum, of all else AdamW's moments: names alone would let AdamW go on from it."""
    muon = {**TINY, "optimizer": {"name": "muon"}}
    world.run(1, save_all, muon, str(tmp_path / "muon"), [1])
    stored = read_metadata(tmp_path / "muon" / "checkpoints" / "step-00000001").tensors
    state = {name.removeprefix("optimizer.") for name in stored if name.startswith("optimizer.")}
    assert "layers.0.attention.wk.weight.momentum_buffer" in state and "embedding.weight.exp_avg_sq" in state
    assert not state & {"layers.0.mlp.up.weight.exp_avg", "output.weight.momentum_buffer"}
    assert world.run(1, load, muon, str(tmp_path / "muon")) == [(1, "")]
    ((step, error),) = world.run(1, load, TINY, str(tmp_path / "muon"))
    assert step is None and "exp_avg, exp_avg_sq" in error and "optimizer.name" in error
    world.run(1, save_all, TINY, str(tmp_path / "adamw"), [1])
    ((step, error),) = world.run(1, load, muon, str(tmp_path / "adamw"))
    assert step is None and "has no momentum_buffer" in error


def test_no_checkpoint_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "inspect", "verify"):
        assert run(["checkpoint", command, str(tmp_path)]) == 2
        assert f"no checkpoint in {tmp_path}" in capsys.readouterr().err


def save_over_one_that_cannot_be_deleted(raw: dict[str, Any], root: str) -> int | None:
    made = trainer(raw, root)
    made.progress.step = 1
    made.save(wait=True)
    delete = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).name == "step-00000001":
            raise OSError(39, "Directory not empty", ".nfs0001")
        delete(path, ignore_errors=ignore_errors)

    shutil.rmtree = refuse  # type: ignore[assignment]
    try:
        made.progress.step = 2
        made.save(wait=True)
    finally:
        shutil.rmtree = delete
    return made.checkpoints.saved_step


def test_an_old_checkpoint_that_cannot_be_deleted_fails_no_save(world: World, tmp_path: Path) -> None:
    raw = {**TINY, "topology": {"tp": 1, "dp": 2}, "checkpoint": {"keep": 1}}
    assert world.run(2, save_over_one_that_cannot_be_deleted, raw, str(tmp_path)) == [2, 2]
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [1, 2]
    (kept,) = events(tmp_path, "checkpoint_kept")
    assert kept["path"].endswith("step-00000001") and "Directory not empty" in kept["why"]
    assert events(tmp_path, "checkpoint_failed") == []
