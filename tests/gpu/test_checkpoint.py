"""Asynchronous checkpoints: staged in pinned memory while training goes on, and read back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.machine import on_cpu, take_device
from tests.recipes import case
from tests.training import train, trainer
from tests.world import World

pytestmark = pytest.mark.gpu


def save_and_read_back(raw: dict[str, Any], root: str) -> dict[str, Any]:
    """Save in the background twice, train on meanwhile, and read the second save into a fresh trainer."""
    import torch
    from torch.distributed.tensor import DTensor

    def held(made: Any) -> dict[str, torch.Tensor]:
        named = made.checkpoints.tensors()
        return {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in named}

    made = trainer(raw, root, take_device())
    for _ in range(2):
        train(made, 1)
        kept = held(made)
        made.save(wait=False)
        stall = made.checkpoints.take_timings()["checkpoint/stall_s"]
        train(made, 1)
        moved = [name for name, tensor in held(made).items() if not tensor.equal(kept[name])]
    made.checkpoints.finish()
    copies = made.checkpoints._copies._kept
    fresh = trainer(raw, root, take_device())
    fresh.resume("auto")
    different = [name for name, tensor in held(fresh).items() if not tensor.equal(kept[name])]
    pinned = all(copy.is_pinned() for copy in copies.values()) if torch.cuda.is_available() else False
    return {
        "different": different,
        "tensors": len(kept),
        "moved": len(moved),
        "step": fresh.progress.step,
        "pinned": pinned,
        "stall_s": stall,
    }


def test_a_save_in_the_background_is_read_back_equal(tmp_path: Path, world: World, note: Callable[..., None]) -> None:
    raw = {
        **case(training={"precision": "bf16"}),
        "checkpoint": {"async": True},
        "logging": {"wandb": {"mode": "disabled"}},
    }
    (found,) = world.run(1, save_and_read_back, raw, str(tmp_path))
    note(**found)
    assert found["step"] == 3
    assert found["different"] == [] and found["tensors"] > 20
    assert found["moved"] > 0.9 * found["tensors"], "training did not go on"
    assert found["pinned"] or on_cpu()
