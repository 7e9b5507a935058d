"""When garbage is collected."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests.recipes import case, resolved
from tests.world import World
from tplaunch.parallel.mesh import Mesh
from tplaunch.train.batch import random_batch
from tplaunch.train.garbage import EVERY, Garbage
from tplaunch.train.step import TrainStep


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_waits_for_a_step_that_all_ranks_share() -> None:
    with Garbage() as garbage:
        assert not gc.isenabled()
        left = weakref.ref(Cycle())
        for step in range(1, EVERY):
            garbage.after(step)
        assert left() is not None
        garbage.after(EVERY)
        assert left() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def tensors_left(raw: dict[str, Any]) -> int:
    """Bytes of tensors that only the collector would free, after two steps without it."""
    recipe = resolved(raw)
    step = TrainStep(recipe, Mesh.of(recipe, torch.device("cpu")))
    batch = random_batch(recipe, step.mesh.topology.dp, step.pipeline.reads_data)
    step.run(batch)
    gc.collect()
    with Garbage():
        gc.set_debug(gc.DEBUG_SAVEALL)
        for _ in range(2):
            step.run(batch)
        gc.collect()
        gc.set_debug(0)
        found = sum(one.untyped_storage().nbytes() for one in gc.garbage if isinstance(one, torch.Tensor))
    gc.garbage.clear()
    step.optimizer.settle()
    return found


EXPERTS = {"moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": 32}}


@pytest.mark.parametrize(
    ("world_size", "raw"),
    [
        (1, case(training={"recompute": "full"})),
        (2, case(cp=2, training={"recompute": "cheap"})),
        (2, case(1, 2, schedule="zbvzerobubble", model=EXPERTS)),
        (2, case(1, 1, 2, ep=2, zero=3, model=EXPERTS, training={"recompute": "full"})),
    ],
    ids=["recomputation", "cp", "zero bubble, experts", "ep, ZeRO 3"],
)
def test_no_tensor_waits_for_the_collector(world: World, world_size: int, raw: dict[str, Any]) -> None:
    assert world.run(world_size, tensors_left, raw) == [0] * world_size
