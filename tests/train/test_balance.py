"""The router's losses, counts and corrections: of the whole global batch, the same on any topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import BATCH, SEQ, case, ranks
from tests.training import batch, train, trainer
from tests.world import World

MOE: dict[str, Any] = {"experts": 8, "top_k": 2, "ffn_hidden_size": 24, "aux_loss": 0.5, "z_loss": 0.05}
CORRECTED = {**MOE, "aux_loss": 0.0, "z_loss": 0.0, "bias_rate": 0.01, "router": "sigmoid"}


def moe_case(*sizes: int, moe: dict[str, Any] = MOE, **more: Any) -> dict[str, Any]:
    training = {"precision": "fp64", **more.pop("training", {})}
    return case(*sizes, model={"num_layers": 4, "moe": moe}, training=training, **more)


def routers(raw: dict[str, Any], root: str) -> tuple[dict[str, float], dict[str, Any], float]:
    """What two steps measured, the gradients of the routers in a third, and its loss."""
    import torch

    made = trainer(raw, root)
    train(made, 2)
    measured = made.step.balance.measure()
    step = made.step
    step.balance.begin_step(made.progress.step + 1, 1.0)
    share = batch(made)
    if made.recipe.training.eod_mask_loss:
        share.labels[:, ::3] = -100
    tokens = step.count_targets(share, BATCH * SEQ)
    loss = step.pipeline.train(share, 1.0 / tokens)
    step.gradients.complete()
    found = {}
    for held in step.gradients.owned:
        if "router.weight" in held.shard.parameter.name and held.gradient.numel():
            found[held.shard.parameter.name] = held.gradient.clone()
    assert all(torch.isfinite(x).all() for x in found.values())
    return measured, found, float(loss)


def gathered(results: list[Any]) -> dict[str, Any]:
    """The gradients of all ranks, rows of ZeRO one below the other."""
    import torch

    names = sorted({name for _, found, _ in results for name in found})
    return {name: torch.cat([found[name] for _, found, _ in results if name in found]) for name in names}


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    folder = tmp_path_factory.mktemp("alone")
    whole = {"micro_batch_size": BATCH}
    return {
        masked: world.run(1, routers, moe_case(training={**whole, "eod_mask_loss": masked}), str(folder / str(masked)))
        for masked in (False, True)
    }


# The auxiliary loss is of sequences, and the mean over those of the global batch: not of microbatches, of ranks, or of
# the targets that count.
SPLITS: dict[str, dict[str, Any]] = {
    "8 microbatches": moe_case(training={"micro_batch_size": 1}),
    "masked": moe_case(training={"eod_mask_loss": True, "micro_batch_size": 2}),
    "dp2": moe_case(1, 1, 2),
    "dp2-ep2": moe_case(1, 1, 2, ep=2),
    "pp2": moe_case(1, 2, 1),
    "tp2": moe_case(2),
    "tp2-sp-full": moe_case(2, sequence_parallel=True, ep=2, training={"recompute": "full"}),
    "cp2": moe_case(cp=2),
    "dp2-masked": moe_case(1, 1, 2, training={"eod_mask_loss": True}),
    "zero-bubble": moe_case(1, 2, 1, schedule="zbvzerobubble"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_losses_and_counts_do_not_depend_on_the_topology(
    world: World, name: str, alone: dict[bool, Any], tmp_path: Path
) -> None:
    import torch

    expected = alone[SPLITS[name]["training"].get("eod_mask_loss", False)]
    results = world.run(ranks(SPLITS[name]), routers, SPLITS[name], str(tmp_path))
    for measured, _, _ in results:
        assert measured.keys() == expected[0][0].keys()
        assert measured == pytest.approx(expected[0][0], rel=1e-9)
    torch.testing.assert_close(gathered(results), gathered(expected), rtol=1e-9, atol=1e-14)


def router_gradient(raw: dict[str, Any], root: str) -> tuple[Any, float, float]:
    """Of the first layer's router after one pass; the loss that training reports, and the auxiliary loss."""
    made = trainer(raw, root)
    step = made.step
    step.balance.begin_step(1, 1.0)
    loss = step.pipeline.train(batch(made), 1.0 / (BATCH * SEQ))
    step.gradients.complete()
    (held,) = (h for h in step.gradients.all if h.shard.name == "layers.0.moe.router.weight")
    return held.gradient.clone(), float(loss), step.balance.measure().get("moe/aux_loss", 0.0)


def test_the_losses_gradient_is_that_of_their_value(world: World, tmp_path: Path) -> None:
    """The reported loss has no router's loss in it, the gradient has: twice the factor, twice its part."""
    found = []
    for number, factor in enumerate((0.0, 1.0, 2.0)):
        raw = moe_case(moe={**MOE, "aux_loss": factor, "z_loss": 0.0})
        found.append(world.run(1, router_gradient, raw, str(tmp_path / str(number)))[0])
    (none, loss, zero), (once, loss_once, aux), (twice, _, aux_twice) = found
    assert loss == loss_once and zero == 0.0 and aux > 0.5 and aux_twice == pytest.approx(2 * aux)
    assert (once - none).abs().max() > 1e-6
    assert ((twice - none) - 2 * (once - none)).abs().max() < 1e-12


def corrections(raw: dict[str, Any], root: str, loss_factor: float = 1.0) -> list[Any]:
    """Of each layer of this rank: corrections and counts after a step."""
    made = trainer(raw, root)
    made.step.run(batch(made), loss_factor)
    return [(number, moe.router.correction.clone(), moe.counts) for number, moe in made.step.balance.layers.items()]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_correction_moves_against_the_load_of_the_step(world: World, tmp_path: Path, recompute: str) -> None:
    import torch

    alone = world.run(
        1, corrections, moe_case(moe=CORRECTED, training={"recompute": recompute}), str(tmp_path / "alone")
    )[0]
    for _, correction, counts in alone:
        assert counts.sum() == BATCH * SEQ * 2, "a microbatch that is made again is counted once"
        mean = BATCH * SEQ * 2 / 8
        torch.testing.assert_close(correction, 0.01 * (mean - counts).sign().float())
        assert correction.any()
    raw = moe_case(1, 2, 2, moe=CORRECTED, ep=2, training={"recompute": recompute})
    for found in world.run(4, corrections, raw, str(tmp_path / "four")):
        assert found
        for number, correction, _ in found:
            assert torch.equal(correction, alone[number][1])


def test_a_skipped_update_moves_no_correction(world: World, tmp_path: Path) -> None:
    for found in world.run(2, corrections, moe_case(1, 1, 2, moe=CORRECTED, ep=2), str(tmp_path), float("nan")):
        assert not any(correction.any() for _, correction, _ in found)


def evaluated(raw: dict[str, Any], root: str) -> list[Any]:
    """Counts after a pass without gradients."""
    made = trainer(raw, root)
    made.step.balance.begin_step(1, 1.0)
    made.step.pipeline.evaluate(batch(made), 1.0)
    return [moe.counts for moe in made.step.balance.layers.values()]


def test_validation_is_not_counted(world: World, tmp_path: Path) -> None:
    assert world.run(1, evaluated, moe_case(), str(tmp_path)) == [[None] * 4]


def test_a_dense_model_has_no_metrics_of_experts(world: World, tmp_path: Path) -> None:
    assert world.run(1, _measure, case(), str(tmp_path)) == [{}]


def _measure(raw: dict[str, Any], root: str) -> dict[str, float]:
    return trainer(raw, root).step.balance.measure()
