"""Checkpoints of adapters: small, of any topology, and only beside the model that they were trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_reshard import AFTER, BEFORE, TOPOLOGIES, check
from tests.recipes import case, ranks
from tests.training import train, trainer
from tests.world import World
from tplaunch.checkpoint.metadata import read_metadata
from tplaunch.checkpoint.store import read_manifest
from tplaunch.errors import TplaunchError
from tplaunch.huggingface.base import base_of, fingerprint

LORA = {"rank": 4, "alpha": 8}


def recipe(layout: dict[str, Any], initial: Path | None, lora: dict[str, Any] | None = LORA) -> dict[str, Any]:
    model = {"hidden_size": 32, "num_layers": 4, "tie_embeddings": True}
    training = {"seq_len": 16, "global_batch_size": 8, "steps": BEFORE + AFTER}
    raw = {**case(**layout, model=model, training=training), "finetune": {"lora": lora}}
    return raw | ({} if initial is None else {"checkpoint": {"initial": str(initial)}})


def make_base(raw: dict[str, Any], root: str) -> None:
    """A model that was trained a little."""
    made = trainer(raw, root)
    train(made, 2)
    made.save(wait=True)


def start(raw: dict[str, Any], root: str, source: str = "auto") -> None:
    """Begin, or go on, and save."""
    made = trainer(raw, root)
    made.resume(source)
    train(made, 2)
    made.save(wait=True)


def why_not(raw: dict[str, Any], root: str, source: str) -> str:
    """Why a run cannot go on."""
    try:
        trainer(raw, root).resume(source)
    except TplaunchError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    world.run(1, make_base, recipe({}, None, None), str(root))
    return root / "checkpoints" / "step-00000002"


def there_and_back(world: World, root: Path, base: Path, names: list[str]) -> None:
    check(world, root, {name: recipe(TOPOLOGIES[name], base) for name in names})


def test_there_and_back(world: World, tmp_path: Path, base: Path) -> None:
    there_and_back(world, tmp_path, base, ["one", "tp2-pp2-dp2-sp"])


@pytest.mark.slow
def test_every_topology_goes_on_from_every_other(world: World, tmp_path: Path, base: Path) -> None:
    there_and_back(world, tmp_path, base, list(TOPOLOGIES))


def test_nothing_of_the_frozen_model_is_stored_and_another_is_refused(world: World, tmp_path: Path, base: Path) -> None:
    run, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    raw = recipe({"dp": 2}, base)
    world.run(ranks(raw), start, raw, str(run))
    saved = run / "checkpoints" / "step-00000002"
    names = {name.removeprefix("model.") for name in read_metadata(saved).tensors}
    assert all(".lora_a" in name or ".lora_b" in name for name in names)
    assert len([name for name in names if not name.startswith("optimizer.")]) == 4 * 7 * 2
    about = read_manifest(saved).about
    assert about["base"] == {"path": str(base), "fingerprint": fingerprint(base)}
    assert about["lora"] == {**LORA, "targets": "all-linear"}

    shutil.copytree(base, moved)
    world.run(1, start, recipe({}, moved), str(tmp_path / "elsewhere"), str(saved))  # the same weights, elsewhere
    world.run(1, make_base, {**recipe({}, None, None), "training": {**raw["training"], "seed": 7}}, str(other))
    changed = other / "checkpoints" / "step-00000002"
    (refused,) = world.run(1, why_not, recipe({}, changed), str(tmp_path / "a"), str(saved))
    assert "has other weights than those that the adapters were trained on" in refused
    (refused,) = world.run(1, why_not, recipe({}, base, {"rank": 8}), str(tmp_path / "b"), str(saved))
    assert "finetune.lora.rank" in refused and "has lora.rank=4, the recipe 8" in refused
    (refused,) = world.run(1, why_not, recipe({}, saved), str(tmp_path / "c"), "auto")
    assert "holds adapters alone, not a model to start from" in refused and "--merge" in refused
    moved.rename(tmp_path / "gone")
    (refused,) = world.run(1, why_not, recipe({}, base, None), str(tmp_path / "d"), str(saved))
    assert "finetune.lora" in refused
    elsewhere = tmp_path / "elsewhere" / "checkpoints" / "step-00000004"
    with pytest.raises(TplaunchError, match="is not there"):
        base_of(elsewhere, read_manifest(elsewhere).about)
