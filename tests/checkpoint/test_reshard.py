"""Save on any topology, go on on any other: the curve is that of the run that was not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case, ranks
from tests.training import train, trainer
from tests.world import World

BEFORE, AFTER = 5, 5
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp": 2},
    "tp4-kv2-sp": {"tp": 4, "sequence_parallel": True},  # two ranks hold the same key and value heads
    "pp2": {"pp": 2},
    "pp2-zbv": {"pp": 2, "schedule": "zbvzerobubble"},  # the tied embedding twice on one rank
    "dp2-zero0": {"dp": 2, "zero": 0},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "dp4-hsdp": {"dp": 4, "zero": 3, "dp_replicate": 2},
    "cp2-dp2-zero3": {"cp": 2, "dp": 2, "zero": 3},
    "cp4": {"cp": 4},
    "ulysses2-tp2-pp2": {"cp": 2, "cp_kind": "ulysses", "tp": 2, "pp": 2},
    "tp2-pp2-dp2-sp": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
    "tp2-pp2-interleaved": {"tp": 2, "pp": 2, "schedule": "interleaved1f1b"},
}
Curve = list[tuple[float, float]]


def recipe(name: str, *, tied: bool) -> dict[str, Any]:
    model = {"hidden_size": 32, "num_layers": 4, "tie_embeddings": tied}
    training = {"seq_len": 16, "global_batch_size": 8, "steps": BEFORE + AFTER}
    return case(**TOPOLOGIES[name], model=model, training=training)


def save_and_go_on(raw: dict[str, Any], root: str) -> Curve:
    """The steps after a save that is written while they run."""
    made = trainer(raw, root)
    train(made, BEFORE)
    made.save(wait=False)
    curve = train(made, AFTER)
    made.checkpoints.finish()
    return curve


def go_on_from(raw: dict[str, Any], root: str, checkpoints: dict[str, str]) -> dict[str, Curve]:
    """The steps after loading each checkpoint, into one model."""
    made = trainer(raw, root)
    curves = {}
    for name, path in checkpoints.items():
        made.resume(path)
        assert made.progress.step == BEFORE
        curves[name] = train(made, AFTER)
    return curves


def check(world: World, root: Path, names: list[str], *, tied: bool) -> None:
    recipes = {name: recipe(name, tied=tied) for name in names}
    whole: dict[str, Curve] = {}
    for name, raw in recipes.items():
        whole[name] = world.run(ranks(raw), save_and_go_on, raw, str(root / name))[0]
    checkpoints = {name: str(root / name / "checkpoints" / f"step-{BEFORE:08d}") for name in names}
    wrong = []
    for target, raw in recipes.items():
        curves = world.run(ranks(raw), go_on_from, raw, str(root / f"{target}-resumed"), checkpoints)[0]
        assert curves[target] == whole[target], f"{target}: not the same run, bit for bit"
        for source, curve in curves.items():
            for ours, theirs in zip(curve, whole[names[0]], strict=True):
                if ours != pytest.approx(theirs, rel=1e-5):
                    wrong.append(f"saved on {source}, loaded on {target}: {ours} instead of {theirs}")
                    break
    assert not wrong, "\n".join(wrong)


def test_there_and_back(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, ["one", "tp2-pp2-dp2-sp"], tied=False)


def test_checkpoints_are_free_of_context_parallelism(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, ["one", "cp4"], tied=False)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_topology_goes_on_from_every_other(world: World, tmp_path: Path, tied: bool) -> None:
    check(world, tmp_path, list(TOPOLOGIES), tied=tied)
