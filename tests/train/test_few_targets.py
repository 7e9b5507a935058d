"""Batches of which masks leave one target, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World

RAW = case(1, 1, 2, training={"eod_mask_loss": True, "precision": "fp64"})


def steps(root: str) -> list[tuple[float, float, bool]]:
    """Loss, gradient norm and whether both are finite of a step without a target, and of two of the same weights: with
    one on rank 1, and with the same one twice on each rank, a factor of 1 named."""
    import torch.distributed as dist

    from tplaunch.parallel.cross_entropy import IGNORE

    made = trainer(RAW, root)
    made.step.optimizer.step = lambda rate: None
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
