"""What CUDA runs: compiled blocks, and attention that keeps no matrix of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.machine import choose, take_device
from tests.recipes import case, resolved
from tests.train.test_topology_invariance import train
from tests.world import World

pytestmark = pytest.mark.gpu


def train_here(raw: dict[str, Any]) -> list[tuple[float, float]]:
    return train(raw, take_device())


def test_compiled_follows_eager(world: World, note: Callable[..., None]) -> None:
    steps = {"steps": 4}
    (eager,) = world.run(1, train_here, case(training=steps))
    (compiled,) = world.run(1, train_here, case(training={**steps, "compile": True}))
    pairs = [pair for step in zip(compiled, eager, strict=True) for pair in zip(*step, strict=True)]
    worst = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    note(worst_relative_difference=worst)
    assert compiled != eager, "nothing was compiled"
    assert worst < 1e-4


def operations(raw: dict[str, Any]) -> list[str]:
    """Names of the operations and kernels of a step, on a rank."""
    import torch
    from torch.profiler import profile

    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import random_batch
    from tplaunch.train.step import TrainStep

    recipe, device = resolved(raw), take_device()
    step = TrainStep(recipe, Mesh.of(recipe, device))
    batch = random_batch(recipe, 1, True)
    step.run(batch)
    with profile() as profiled:
        step.run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return [event.key for event in profiled.key_averages()]


def test_attention_is_flash_attention(world: World, note: Callable[..., None]) -> None:
    length = choose(1024, 64)
    model = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2}
    raw = case(model=model, training={"precision": "bf16", "seq_len": length})
    (names,) = world.run(1, operations, raw)
    attention = sorted(name for name in names if "attention" in name and name.startswith("aten::"))
    note(operations=attention)
    assert any("flash_attention" in name or "cudnn_attention" in name for name in attention), attention
    assert not any("attention_math" in name for name in attention), attention
