"""Batches of which masks leave one target, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World

RAW = case(1, 1, 2, training={"eod_mask_loss": True, "precision": "fp64"})


def masked(raw: dict[str, Any], root: str) -> list[tuple[float, float]]:
    """Two steps of which few targets count: the first five of a row, and the last of some rows."""
    from tplaunch.parallel.cross_entropy import IGNORE

    made = trainer(raw, root)
    found = []
    for _ in range(2):
        whole = batch(made)
        whole.labels[:, 5:-1] = IGNORE
        whole.labels[whole.tokens[:, 0] % 2 == 0, -1] = IGNORE
        result = made.step.run(whole)
        found.append((result.loss, result.grad_norm))
    return found


@pytest.mark.parametrize("zero", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_targets_of_a_shared_sequence_count_once_wherever_they_are(world: World, tmp_path: Path, zero: int) -> None:
    training = {"eod_mask_loss": True, "precision": "fp64", "micro_batch_size": 2}
    (alone,) = world.run(1, masked, case(training=training), str(tmp_path / "alone"))
    for kind, dp, cp in (("allgather", 1, 4), ("ulysses", 2, 2)):
        raw = case(1, 1, dp, cp=cp, cp_kind=kind, zero=zero, training=training)
        for found in world.run(dp * cp, masked, raw, str(tmp_path / kind)):
            assert found == [pytest.approx(step, rel=1e-9) for step in alone]


def steps(root: str) -> list[tuple[float, float, bool]]:
    """Loss, gradient norm and whether both are finite of a step without a target, and of two of the same weights: with
    one on rank 1, and with the same one twice on each rank, a factor of 1 named."""
    import torch.distributed as dist

    from tplaunch.parallel.cross_entropy import IGNORE

    made = trainer(RAW, root)
    made.step.optimizer.step = lambda *rates, **decay: None
    whole, found = batch(made), []
    whole.tokens[:] = whole.tokens[0]
    dist.broadcast(whole.tokens, 0)
    for rows, factor in (([], ()), ([0] if dist.get_rank() == 1 else [], ()), ([0, 1], (1.0,))):
        whole.labels.fill_(IGNORE)
        whole.labels[rows, 3] = 7
        result = made.step.run(whole, *factor)
        found.append((result.loss, result.grad_norm, result.finite))
    return found


def test_the_mean_is_over_the_targets_that_count(world: World, tmp_path: Path) -> None:
    ranks: list[list[Any]] = world.run(2, steps, str(tmp_path))
    assert ranks[0] == ranks[1]
    none, one, four = ranks[0]
    assert none == (0.0, 0.0, True)
    assert one[0] > 1.0 and one[1] > 0.0
    assert four == (pytest.approx(one[0], rel=1e-12), pytest.approx(one[1], rel=1e-12), True)
