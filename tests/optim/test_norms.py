"""Norms of the whole model: the same on any topology, and those of the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, resolved
from tests.world import World

STEPS = 3
TIED = {"tie_embeddings": True, "num_layers": 4}
FOUR = {"num_layers": 4}
BIASED = {"num_layers": 4, "num_kv_heads": 1, "qkv_bias": True, "linear_bias": True, "norm": "layernorm"}
EXPERTS = {
    "num_layers": 4,
    "moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": 32, "biases": True, "dense_layers": 1, "bias_rate": 0.01},
}
SGD = {"name": "sgd", "momentum": 0.9}
MUON = {"name": "muon", "groups": [{"match": "layers.?.mlp.*", "lr": 1e-3, "weight_decay": 0.3}]}
PLAIN_SGD = {"name": "sgd", "momentum": 0.0}

CASES: dict[str, dict[str, Any]] = {
    "tp2-sp": case(2, model=FOUR, sequence_parallel=True),
    "pp2-tied": case(1, 2, model=TIED),
    "zbv-tied": case(1, 2, model=TIED, schedule="zbvzerobubble"),
    "dp2-zero0": case(1, 1, 2, model=FOUR, zero=0),
    "dp2-zero1": case(1, 1, 2, model=FOUR, zero=1),
    "dp2-zero3": case(1, 1, 2, model=FOUR, zero=3),
    "dp4-hsdp": case(1, 1, 4, model=FOUR, zero=3, dp_replicate=2),
    "tp2-pp2-dp2-tied": case(2, 2, 2, model=TIED),
    "kv-copies-biases": case(2, 1, 2, model=BIASED),
    "sgd-dp2-zero1": case(1, 1, 2, model=FOUR, optimizer=SGD),
    "experts-tp2-ep2": case(2, model=EXPERTS, ep=2),
    "experts-tp4-sp-etp2-zero0": case(4, model=EXPERTS, expert_tp=2, sequence_parallel=True, zero=0),
    "experts-tp2-dp2-ep2-etp2": case(2, 1, 2, model=EXPERTS, ep=2, expert_tp=2),
    "experts-dp4-hsdp-ep2-zero3": case(1, 1, 4, model=EXPERTS, ep=2, zero=3, dp_replicate=2),
    "plain-sgd-tp2": case(2, model=FOUR, optimizer=PLAIN_SGD),
    "muon-tp2-dp2-zero1": case(2, 1, 2, model={"num_layers": 4, "num_kv_heads": 1}, optimizer=MUON),
}


def measure(raw: dict[str, Any]) -> list[dict[str, float]]:
    """The norms of some steps."""
    import torch
    import torch.distributed as dist

    from tests.training import batch
    from tplaunch.optim.norms import Norms
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.step import TrainStep

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    step = TrainStep(recipe, mesh)
    norms = Norms(step.gradients, step.optimizer, recipe.model)
    step.mark = lambda number, part: norms.gradients_complete(1.0) if part == "update" else None

    class Made:
        """As `tests.training.batch` wants it."""

        recipe = step.recipe
        mesh = step.mesh
        progress = step.progress

    found = []
    for _ in range(STEPS):
        norms.watch(blocks=True)
        before = [weight.detach().clone() for _, _, weight in step.optimizer.shards]
        result = step.run(batch(Made))
        measured = norms.take(updated=result.finite)
        measured["loss"], measured["grad_norm"] = result.loss, result.grad_norm
        if dist.get_world_size() == 1:  # the tensors are all here
            after = [weight.detach() for _, _, weight in step.optimizer.shards]
            change = [new.double() - old.double() for new, old in zip(after, before, strict=True)]
            squares = [sum(float(t.double().square().sum()) for t in tensors) for tensors in (after, change)]
            measured["true param_norm"] = squares[0] ** 0.5
            measured["true update_ratio"] = (squares[1] / squares[0]) ** 0.5
        found.append(measured)
    assert norms.take(updated=True) == {}, "no step was watched"
    step.optimizer.settle()
    return found


@pytest.fixture(scope="module")
def references() -> dict[str, list[dict[str, float]]]:
    return {}


@pytest.mark.parametrize("name", CASES)
def test_norms_are_those_of_one_process(world: World, references: dict[str, list[dict[str, float]]], name: str) -> None:
    raw = CASES[name]
    plain = {**raw, "topology": {"tp": 1, "pp": 1, "dp": 1}}
    if (key := repr(plain)) not in references:
        (references[key],) = world.run(1, measure, plain)
    topology = raw["topology"]
    ranks = world.run(topology["tp"] * topology["pp"] * topology["dp"], measure, raw)
    assert all(rank == ranks[0] for rank in ranks), "the ranks do not agree"
    for ours, one in zip(ranks[0], references[key], strict=True):
        assert ours == pytest.approx({k: v for k, v in one.items() if not k.startswith("true")}, rel=1e-5)
        assert one["param_norm"] == pytest.approx(one["true param_norm"], rel=1e-6)
        # What was subtracted from fp32 weights is rounded to their precision.
        assert one["update_ratio"] == pytest.approx(one["true update_ratio"], rel=2e-5)
        blocks = {name: norm for name, norm in ours.items() if name.startswith("grad_norm/")}
        assert {f"grad_norm/{block}" for block in ("embedding", "norm", *(f"layers.{i}" for i in range(4)))} <= set(
            blocks
        )
        assert sum(norm**2 for norm in blocks.values()) == pytest.approx(ours["grad_norm"] ** 2, rel=1e-5)
