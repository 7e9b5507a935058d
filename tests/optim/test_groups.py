"""Which group a parameter is in, and with which rate it is updated. Whole runs of it: `tests/train/test_oracle.py`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, resolved
from tests.world import World
from tplaunch.recipe.schema import Optimizer
from tplaunch.spec.optimizer import Group, group_of, groups_of
from tplaunch.spec.parameters import parameter_shapes

MOE = {
    "norm": "layernorm",
    "qkv_bias": True,
    "moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 32, "bias_rate": 0.0},
}
RULES = [
    {"match": "layers.1.*", "lr": 6e-4},
    {"match": "layers.*.moe.experts.*", "weight_decay": 0.3},
    {"match": "*norm.*", "weight_decay": 0.2, "lr": 0.0},
    {"match": "output.weight", "lr": 1e-3},
]


def groups(**optimizer: Any) -> dict[str, Group]:
    """The group of every trained parameter, by its name."""
    settings = Optimizer(lr=3e-4, **optimizer)
    parameters = [p for p in parameter_shapes(resolved(case(model=MOE)).model) if p.trained]
    return {parameter.name: group_of(settings, parameter) for parameter in parameters}


def test_muon_has_hidden_matrices_and_each_experts() -> None:
    found = groups(name="muon")
    assert {name.split(".", 2)[-1] for name, group in found.items() if group.kind == "muon"} == {
        *(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")),
        *(f"moe.{part}.{name}.weight" for part in ("experts", "shared") for name in ("gate", "up", "down")),
    }
    assert found["layers.0.moe.router.weight"] == Group("decay", "adamw", 1.0, 0.1)
    assert found["embedding.weight"] == found["output.weight"] == Group("decay", "adamw", 1.0, 0.1)
    assert found["layers.0.attention.wq.bias"] == found["norm.weight"] == Group("no_decay", "adamw", 1.0, 0.0)
    assert found["layers.0.attention.wq.weight"] == Group("muon", "muon", 1.0, 0.1)
    for name in ("adamw", "sgd"):
        assert {group.kind for group in groups(name=name).values()} == {name}


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_the_first_group_that_matches_has_it(name: str) -> None:
    found = groups(name=name, groups=RULES)
    assert found["layers.1.moe.experts.up.weight"] == Group("group_1", name, 2.0, 0.1)
    assert found["layers.0.moe.experts.up.weight"] == Group("group_2", name, 1.0, 0.3)
    rest = "adamw" if name == "muon" else name
    assert found["layers.1.mlp_norm.bias"] == Group("group_1", rest, 2.0, 0.0), "without weight_decay norms have none"
    assert found["layers.0.mlp_norm.bias"] == Group("group_3", rest, 0.0, 0.2)
    assert found["embedding.weight"] == groups(name=name)["embedding.weight"]


def rates(raw: dict[str, Any]) -> dict[str, float]:
    """The rates of the second update."""
    import torch

    from tests.training import batch
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.step import TrainStep

    recipe = resolved(raw)
    step = TrainStep(recipe, Mesh.of(recipe, torch.device("cpu")))

    class Made:
        """As `tests.training.batch` wants it."""

        mesh, progress = step.mesh, step.progress

    Made.recipe = recipe  # type: ignore[attr-defined]
    frozen = [(shard.parameter.name, shard.weight.clone()) for _, shard, _ in step.optimizer.shards]
    for _ in range(2):
        step.run(batch(Made))
    for (name, before), (_, shard, _) in zip(frozen, step.optimizer.shards, strict=True):
        assert torch.equal(before, shard.weight) == ("norm" in name and not name.startswith("layers.1.")), name
    step.optimizer.settle()
    return step.optimizer.learning_rates


def test_every_rank_knows_every_rate(world: World) -> None:
    """Also of groups whose parameters other pipeline ranks hold. All follow the schedule, here a warmup of 4 steps."""
    raw = case(1, 2, optimizer={"name": "muon", "lr": 3e-4, "groups": [RULES[0], RULES[2], RULES[3]]})
    found = world.run(2, rates, {**raw, "lr_schedule": {"warmup_steps": 4}})
    expected = {"muon": 3e-4, "decay": 3e-4, "group_1": 6e-4, "group_2": 0.0, "group_3": 1e-3}
    assert found == [pytest.approx({name: rate / 2 for name, rate in expected.items()})] * 2


def test_groups_of_a_model_are_those_of_its_parameters() -> None:
    settings = Optimizer(name="muon", groups=RULES)
    parameters = parameter_shapes(resolved(case(model=MOE)).model)
    found = groups_of(settings, parameters)
    assert len(found) == len(set(found)) and set(found) == {group_of(settings, p) for p in parameters if p.trained}
