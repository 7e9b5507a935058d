"""Validation between steps: the same loss on any topology, and no trace of it in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.recipes import SEQ, VOCAB, case, ranks, resolved
from tests.world import World

FOUR = {"num_layers": 4}
CASES = {
    "tp2-sp": case(2, sequence_parallel=True, model=FOUR),
    "dp2-zero3": case(1, 1, 2, zero=3, model=FOUR),
    "pp2-dp2": case(1, 2, 2),
    "cp2-tp2-sp": case(2, cp=2, sequence_parallel=True, model=FOUR),
    "ulysses2-pp2": case(1, 2, cp=2, cp_kind="ulysses"),
    "pp2-dp2-zero2": case(1, 2, 2, zero=2),
    "interleaved": case(1, 2, schedule="interleaved1f1b"),
    "zero-bubble": case(1, 2, schedule="interleavedzerobubble"),
    "zbv": case(1, 2, schedule="zbvzerobubble"),
    "dualpipev": case(1, 2, schedule="dualpipev"),
}


def losses(raw: dict[str, Any], validate: bool) -> list[float]:
    """Losses of: validation, step, validation, step, validation (steps only, without `validate`)."""
    import torch.distributed as dist

    from tplaunch.model.build import build_stages
    from tplaunch.optim.gradients import GradientFinalizer
    from tplaunch.optim.optimizer import ShardedOptimizer
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import Batch
    from tplaunch.train.step import make_pipeline

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    stages = build_stages(recipe, mesh)
    pipeline = make_pipeline(stages, mesh, recipe)
    optimizer = ShardedOptimizer(stages, recipe, mesh)
    finalizer = GradientFinalizer(
        stages, mesh, schedule=recipe.topology.schedule, num_stages=pipeline.num_stages, tied=False
    )
    data = torch.randint(VOCAB, (16, SEQ + 1), generator=torch.Generator().manual_seed(3))
    mine = data.chunk(mesh.topology.dp)[mesh.coordinates.dp]
    batch, scale = Batch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous()), 1 / (16 * SEQ)

    def everywhere(loss: torch.Tensor) -> float:
        total = loss.clone() if pipeline.has_loss and mesh.tp.rank == 0 else torch.zeros_like(loss)
        dist.all_reduce(total)
        return float(total)

    found = []
    for turn in range(3):
        if validate:
            found.append(everywhere(pipeline.evaluate(batch, scale)))
        if turn < 2:
            found.append(everywhere(pipeline.train(batch, scale)))
            finalizer.complete()
            optimizer.step(0.01)
            optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def reference(world: World) -> list[float]:
    (found,) = world.run(1, losses, case(model=FOUR), True)
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # validation sees the weights that the next step sees
    assert found[2] == pytest.approx(found[3], rel=1e-6)
    assert found[4] < found[2] < found[0]
    return found


def test_one_process_trains_the_same_without_validation(world: World, reference: list[float]) -> None:
    assert world.run(1, losses, case(model=FOUR), False)[0] == reference[1::2]


@pytest.mark.parametrize("name", CASES)
def test_validation_between_steps(world: World, reference: list[float], name: str) -> None:
    raw = CASES[name]
    size = ranks(raw)
    for found in world.run(size, losses, raw, True):
        assert found == pytest.approx(reference, rel=1e-5)
