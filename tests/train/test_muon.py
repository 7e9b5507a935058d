"""Muon: any topology, the same run, and its checkpoints go on on any other.

Newton-Schulz makes differences of rounding up to 485 times as large where a matrix has no singular value
(`tests/optim/test_muon.py`): fp32's 6e-8 become 3e-5 of an update, a run's loss is that of one process to 1e-5 all the
same, and in fp64 to 1e-9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_reshard import AFTER, BEFORE, go_on_from, save_and_go_on
from tests.recipes import case, ranks
from tests.train.test_expert_invariance import DEEPSEEK, GPT_OSS, MIXTRAL
from tests.train.test_topology_invariance import GPT2, TOLERANCE, plain, train
from tests.world import World

GROUPS = [{"match": "layers.*.attention.w[kv].*", "lr": 1e-3, "weight_decay": 0.3}, {"match": "output.*", "lr": 3e-4}]
LATENT = {"latent": {"q_rank": 24, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "value_dim": 12}, "num_kv_heads": 4}
# Fewer tokens than matrices have rows: most of their singular values are zero.
FEW = {
    "training": {"global_batch_size": 4, "micro_batch_size": 1},
    "model": {"hidden_size": 256, "ffn_hidden_size": 384},
}

CASES: dict[str, dict[str, Any]] = {
    "tp2-dp2-zero1": case(2, 1, 2),
    "tp2-dp2-zero3-sp": case(2, 1, 2, zero=3, sequence_parallel=True),
    "tp4-kv1-sp": case(4, model={"num_kv_heads": 1}, sequence_parallel=True),
    "dp4-zero0": case(1, 1, 4, zero=0),
    "dp4-zero2": case(1, 1, 4, zero=2),
    "dp4-hsdp-zero1": case(1, 1, 4, zero=1, dp_replicate=2),
    "kv2-tp4-dp2-zero3": case(4, 1, 2, zero=3),
    "pp2-dp2-interleaved": case(1, 2, 2, schedule="interleaved1f1b"),
    "tp2-pp2-zbv-sp": case(2, 2, schedule="zbvzerobubble", sequence_parallel=True),
    "gpt2-tp2-pp2-dp2": case(2, 2, 2, model=GPT2),
    "cp2-dp2-zero1": case(1, 1, 2, cp=2),
    "few-tokens-tp2-dp2": case(2, 1, 2, **FEW),
}
# In fp64 alone: rounding would turn near ties of routers.
EXPERTS: dict[str, dict[str, Any]] = {
    "experts-tp2-dp2-ep2-etp2": case(2, 1, 2, ep=2, expert_tp=2, model=DEEPSEEK),
    "experts-tp2-dp2-ep2-zero1": case(2, 1, 2, ep=2, model=MIXTRAL, sequence_parallel=True),
    "experts-dp4-ep2-zero3": case(1, 1, 4, ep=2, zero=3, model=DEEPSEEK),
    "experts-dp4-ep2-zero0": case(1, 1, 4, ep=2, zero=0, model=MIXTRAL),
    "experts-tp2-pp2-dp2-ep4-zbv": case(2, 2, 2, ep=4, schedule="zbvzerobubble", model=DEEPSEEK),
    "experts-cp2-dp4-ep2-hsdp": case(1, 1, 4, cp=2, ep=2, dp_replicate=2, model=GPT_OSS),
    "latent-tp4-dp2": case(4, 1, 2, model=LATENT),
}
DEFAULT = {("tp2-dp2-zero1", "fp32"), ("tp2-dp2-zero3-sp", "fp64"), ("experts-tp2-dp2-ep2-etp2", "fp64")}


@pytest.fixture(scope="module")
def references() -> dict[str, list[tuple[float, float]]]:
    return {}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[] if (name, precision) in DEFAULT else [pytest.mark.slow])
        for name in (*CASES, *EXPERTS)
        for precision in ("fp32", "fp64")
        if precision == "fp64" or name in CASES
    ],
)
def test_curve_is_that_of_one_process(
    world: World, references: dict[str, list[tuple[float, float]]], name: str, precision: str
) -> None:
    raw = muon({**CASES, **EXPERTS}[name], precision)
    reference = plain(raw)
    if (key := repr(reference)) not in references:
        (references[key],) = world.run(1, train, reference)
    curves = world.run(ranks(raw), train, raw)
    assert all(curve == curves[0] for curve in curves), "the ranks do not agree"
    for step, (ours, theirs) in enumerate(zip(curves[0], references[key], strict=True), 1):
        assert ours == pytest.approx(theirs, rel=TOLERANCE[precision]), f"step {step}"
    assert curves[0][-1][0] < curves[0][0][0], "nothing was learnt"


def muon(raw: dict[str, Any], precision: str) -> dict[str, Any]:
    training = {**raw["training"], "precision": precision}
    return {**raw, "training": training, "optimizer": {"name": "muon", "lr": 3e-3, "groups": GROUPS}}


RESUMED: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-pp2-dp2-sp": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
    "tp4-kv2-zero3": {"tp": 4, "dp": 2, "zero": 3},
    "dp4-zero0": {"dp": 4, "zero": 0},
}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tp2-pp2-dp2-sp", "one"),
        *(pytest.param(a, b, marks=pytest.mark.slow) for a in RESUMED for b in RESUMED if b != "one"),
    ],
)
def test_a_checkpoint_goes_on_elsewhere(world: World, tmp_path: Path, source: str, target: str) -> None:
    training = {"seq_len": 16, "steps": BEFORE + AFTER}
    recipes = {
        name: muon(case(**RESUMED[name], model={"num_layers": 4}, training=training), "fp32")
        for name in (source, target)
    }
    raw = recipes[source]
    whole = world.run(ranks(raw), save_and_go_on, raw, str(tmp_path / "saved"))[0]
    saved = {"it": str(tmp_path / "saved" / "checkpoints" / f"step-{BEFORE:08d}")}
    raw = recipes[target]
    found = world.run(ranks(raw), go_on_from, raw, str(tmp_path / "resumed"), saved)[0]["it"]
    if source == target:
        assert found == whole, "not the same run, bit for bit"
    for ours, theirs in zip(found, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
