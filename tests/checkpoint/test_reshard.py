"""Save on any topology, go on on any other: the curve is that of the run that was not interrupted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case, ranks
from tests.training import train, trainer
from tests.world import World

BEFORE, AFTER = 3, 3
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
MIXTURES: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2-ep2-zero0": {"dp": 2, "ep": 2, "zero": 0},
    "dp4-ep2": {"dp": 4, "ep": 2},
    "dp3-ep3-zero3": {"dp": 3, "ep": 3, "zero": 3},
    "dp4-hsdp-etp2-zero2": {"dp": 4, "expert_tp": 2, "zero": 2, "dp_replicate": 2},
    "dp6": {"dp": 3, "tp": 2},  # six parts of the rows of all experts
    "tp2-etp2-sp": {"tp": 2, "expert_tp": 2, "sequence_parallel": True},
    "cp2-tp2-ep2": {"cp": 2, "tp": 2, "ep": 2},
    "pp2-ep2-zbv": {"pp": 2, "dp": 2, "ep": 2, "schedule": "zbvzerobubble"},
    "tp2-pp2-dp2-ep2-etp2": {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "expert_tp": 2},
}
MOE = {"experts": 6, "top_k": 2, "ffn_hidden_size": 16, "dense_layers": 1, "biases": True, "bias_rate": 0.01}
Curve = list[tuple[float, float]]


def recipe(layout: dict[str, Any], *, tied: bool, moe: dict[str, Any] | None = None) -> dict[str, Any]:
    model = {"hidden_size": 32, "num_layers": 4, "tie_embeddings": tied, "moe": moe}
    training = {"seq_len": 16, "global_batch_size": 12 if moe else 8, "steps": BEFORE + AFTER}
    return case(**layout, model=model, training=training | ({"micro_batch_size": 1} if moe else {}))


def save_and_go_on(raw: dict[str, Any], root: str) -> Curve:
    """The steps after a save that is written while they run."""
    made = trainer(raw, root)
    made.resume("auto")
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


def check(world: World, root: Path, recipes: dict[str, dict[str, Any]]) -> None:
    names = list(recipes)
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


def dense(names: Iterable[str] = TOPOLOGIES, *, tied: bool = False) -> dict[str, dict[str, Any]]:
    return {name: recipe(TOPOLOGIES[name], tied=tied) for name in names}


def mixtures(names: Iterable[str] = MIXTURES) -> dict[str, dict[str, Any]]:
    return {name: recipe(MIXTURES[name], tied=True, moe=MOE) for name in names}


def test_there_and_back(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, dense(["one", "tp2-pp2-dp2-sp"]))


def test_checkpoints_are_free_of_context_parallelism(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, dense(["one", "cp4"]))


def test_checkpoints_are_free_of_expert_parallelism(world: World, tmp_path: Path) -> None:
    """Router corrections among them."""
    check(world, tmp_path, mixtures(["dp4-ep2", "tp2-etp2-sp"]))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_topology_goes_on_from_every_other(world: World, tmp_path: Path, tied: bool) -> None:
    check(world, tmp_path, dense(tied=tied))


@pytest.mark.slow
def test_experts_go_on_from_every_topology_on_every_other(world: World, tmp_path: Path) -> None:
    check(world, tmp_path, mixtures())
