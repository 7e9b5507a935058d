"""`plan` against what CUDA's allocator counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.machine import choose, on_cpu, take_device
from tests.plan.test_memory import memory
from tests.recipes import resolved
from tests.world import World

pytestmark = pytest.mark.gpu
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "one-microbatch": {"global_batch_size": 2},
    "recompute-full": {"recompute": "full"},
    "cheap": {"recompute": "cheap"},
    "core": {"recompute": {"again": ["core_attention"]}},
    "compile": {"compile": True},
    "fp32": {"precision": "fp32"},
}


def recipe(training: dict[str, Any]) -> dict[str, Any]:
    hidden, layers, heads, vocab, length = choose((2048, 8, 16, 32_000, 2048), (64, 2, 4, 512, 64))
    return {
        "name": "memory",
        "model": {
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": heads // 2,
            "ffn_hidden_size": 3 * hidden,
            "vocab_size": vocab,
        },
        "topology": {"dp": 1},
        "training": {
            "seq_len": length,
            "micro_batch_size": 2,
            "global_batch_size": 6,
            "steps": 3,
            "precision": "bf16",
            **training,
        },
        "data": {"train": "unused"},
    }


def peak(raw: dict[str, Any]) -> float:
    """Bytes allocated at the fullest moment of a third step, on a rank; on the CPU, where none are counted, 0."""
    import torch

    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import random_batch
    from tplaunch.train.step import TrainStep

    made, device = resolved(raw), take_device()
    step = TrainStep(made, Mesh.of(made, device))
    batch = random_batch(made, 1, True)
    for _ in range(2):
        step.run(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step.run(batch)
    return float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0


@pytest.mark.parametrize("name", CASES)
def test_peak_is_the_planned_one(world: World, note: Callable[..., None], name: str) -> None:
    raw = recipe(CASES[name])
    (planned,) = memory(raw)
    (held,) = world.run(1, peak, raw)
    if on_cpu():
        pytest.skip("not measured without a GPU")
    error = planned.allocated / held - 1
    note(planned_gib=planned.allocated / 2**30, held_gib=held / 2**30, error=error)
    assert abs(error) < 0.05
