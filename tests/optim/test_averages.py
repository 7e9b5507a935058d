"""Averages of weights: as torch's `AveragedModel` has them, on any topology, through checkpoints, beside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.recipes import BATCH, SEQ, case, ranks
from tests.training import batch, trainer
from tests.world import World

EMA = {"ema": {"decay": 0.9, "every": 2, "from": 3}, "precision": "fp64"}  # updates after steps 4, 6, 8, 10
FOUR = {"num_layers": 4}
TOPOLOGIES = {
    "tp2": case(2, sequence_parallel=True, model=FOUR, training=EMA),
    "pp2": case(1, 2, training=EMA),
    "dp2-zero1": case(1, 1, 2, zero=1, model=FOUR, training=EMA),
    "dp2-zero3": case(1, 1, 2, zero=3, model=FOUR, training=EMA),
}
ONE = case(model=FOUR, training=EMA)


def whole(named: Any) -> dict[str, Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in named}


def merged(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for result in results for name, tensor in result.items()}


def averages(raw: dict[str, Any], root: str, steps: int) -> dict[str, Tensor]:
    made = trainer(raw, root)
    for _ in range(steps):
        made.step.run(batch(made))
    assert made.progress.averaged == sum(step > 3 and step % 2 == 0 for step in range(1, steps + 1))
    return whole(made.step.averages.state())


def torchs(raw: dict[str, Any], root: str, steps: int) -> dict[str, Tensor]:
    """The same by torch, in one process."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    made = trainer(raw, root)
    shards = [shard for stage in made.step.stages for shard in stage.sharding.shards]
    model = torch.nn.ParameterList(torch.nn.Parameter(shard.weight.clone()) for shard in shards)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(1, steps + 1):
        made.step.run(batch(made))
        if step in (4, 6, 8, 10):
            for parameter, shard in zip(model, shards, strict=True):
                parameter.data.copy_(shard.weight)
            reference.update_parameters(model)
    return {shard.parameter.name: parameter.detach() for shard, parameter in zip(shards, reference.module, strict=True)}


@pytest.fixture(scope="module")
def expected(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return world.run(1, torchs, ONE, str(tmp_path_factory.mktemp("torch")), 10)[0]


def test_one_process_has_those_of_torch(world: World, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    (ours,) = world.run(1, averages, ONE, str(tmp_path), 10)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    bf16 = case(training={**EMA, "precision": "bf16"})
    (ours,), (theirs,) = (world.run(1, made, bf16, str(tmp_path / made.__name__), 6) for made in (averages, torchs))
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.float32 for name in theirs)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_any_topology_has_the_same(world: World, tmp_path: Path, expected: dict[str, Tensor], name: str) -> None:
    ours = merged(world.run(ranks(TOPOLOGIES[name]), averages, TOPOLOGIES[name], str(tmp_path), 10))
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pp2", "dp2-zero3"])
def test_adapters_alone_have_them(world: World, tmp_path: Path, name: str) -> None:
    lora = {"finetune": {"lora": {"rank": 4, "alpha": 8}}}
    one, other = ({**raw, **lora} for raw in (ONE, TOPOLOGIES[name]))
    expected = world.run(1, averages, one, str(tmp_path / "one"), 4)[0]
    ours = merged(world.run(ranks(other), averages, other, str(tmp_path / "other"), 4))
    assert ours.keys() == expected.keys() and all(".lora_" in key for key in ours)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-9)


def stop_and_go(raw: dict[str, Any], root: str, *, save_at: int = 0, resume: bool = False, to: int) -> Any:
    made = trainer(raw, root)
    if resume:
        made.resume("auto")
    loaded = whole(made.step.averages.state())
    while made.progress.step < to:
        made.step.run(batch(made))
        if made.progress.step == save_at:
            made.save(wait=True)
    return loaded, whole(made.step.averages.state())


def saving(raw: dict[str, Any], root: str) -> Any:
    return stop_and_go(raw, root, save_at=5, to=10)


def resuming(raw: dict[str, Any], root: str) -> Any:
    return stop_and_go(raw, root, resume=True, to=10)


def saved_at(raw: dict[str, Any], root: str) -> Any:
    return stop_and_go(raw, root, resume=True, to=5)


def test_they_go_through_checkpoints_to_any_topology(world: World, tmp_path: Path) -> None:
    raw = {**TOPOLOGIES["dp2-zero1"], "checkpoint": {"keep": 9}}
    straight = merged([result[1] for result in world.run(2, saving, raw, str(tmp_path))])
    resumed = world.run(2, resuming, raw, str(tmp_path))
    again = merged([result[1] for result in resumed])
    assert all(torch.equal(again[name], straight[name]) for name in straight), "bit for bit"
    loaded = merged([result[0] for result in resumed])
    other = merged([result[0] for result in world.run(2, saved_at, TOPOLOGIES["tp2"], str(tmp_path))])
    assert all(torch.equal(other[name], loaded[name]) for name in loaded)
    assert not all(torch.equal(loaded[name], straight[name]) for name in loaded)


def stumbling(raw: dict[str, Any], root: str) -> list[Any]:
    """The averages before and after a step that is skipped, when their update was due."""
    made = trainer(raw, root)
    for _ in range(5):
        made.step.run(batch(made))
    before, count = whole(made.step.averages.state()), made.progress.averaged
    result = made.step.run(batch(made), float("nan"))
    assert not result.finite
    return [before, whole(made.step.averages.state()), count, made.progress.averaged]


def test_a_skipped_step_changes_nothing(world: World, tmp_path: Path) -> None:
    for before, after, count, then in world.run(2, stumbling, TOPOLOGIES["dp2-zero3"], str(tmp_path)):
        assert count == then == 1
        assert all(torch.equal(before[name], after[name]) for name in before)


def validating(raw: dict[str, Any], root: str) -> Any:
    """Loss by the averages, as validation gives it; and by weights that were set to them by hand."""
    made = trainer(raw, root)
    for _ in range(6):
        made.step.run(batch(made))
    weights = [weight.detach().clone() for _, _, weight in made.step.optimizer.shards]
    found = made.validation.measure()
    for kept, (_, _, weight) in zip(weights, made.step.optimizer.shards, strict=True):
        assert torch.equal(kept, weight), "validation left the weights as they were"
    after = made.step.run(batch(made)).loss
    for average, (_, _, weight) in zip(made.step.averages._averages, made.step.optimizer.shards, strict=True):
        weight.data.copy_(average)
    made.step.optimizer.publish()
    return found, made.validation.measure(), after


def test_validation_measures_them_and_leaves_training_alone(world: World, tmp_path: Path) -> None:
    import numpy as np

    from tplaunch.data.indexed import IndexedWriter

    writer = IndexedWriter(tmp_path / "text", np.dtype(np.uint16))
    writer.add(np.random.default_rng(0).integers(0, 300, 2 * BATCH * SEQ + 1).astype(np.uint16))
    writer.end_document()
    writer.compose()
    writer.commit()
    text = str(tmp_path / "text")
    training = {"ema": {"decay": 0.9}, "eval_every": 1, "eval_steps": 2}
    losses = []
    for name, made in (("a", case(model=FOUR)), ("b", case(1, 1, 2, zero=3, model=FOUR))):
        made["training"] |= training
        made["data"] = {"train": text, "validation": {"wiki": text}}
        found, by_hand, after = world.run(ranks(made), validating, made, str(tmp_path / name))[0]
        assert set(found) == {
            f"validation/wiki/{kind}{figure}" for kind in ("", "ema/") for figure in ("loss", "perplexity")
        }
        key = "validation/wiki/ema/loss"
        assert abs(found[key] - found["validation/wiki/loss"]) > 1e-6
        # Seven updates are in those of the second measurement, six in the first's.
        assert by_hand[key] == by_hand["validation/wiki/loss"]
        losses.append((*found.values(), after))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
