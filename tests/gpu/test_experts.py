"""Mixtures of experts on CUDA: the same run as on the CPU, and in bf16 by one kernel for all experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.machine import on_cpu, take_device
from tests.gpu.test_kernels import operations
from tests.recipes import case
from tests.train.test_topology_invariance import train
from tests.world import World

pytestmark = pytest.mark.gpu
SPARSE = {"experts": 4, "top_k": 2, "ffn_hidden_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "softmax": SPARSE,
    "shared, sigmoid, corrected": {
        **SPARSE,
        "router": "sigmoid",
        "shared_ffn_hidden_size": 32,
        "bias_rate": 1e-3,
        "aux_loss": 1e-2,
        "z_loss": 1e-3,
    },
    "biases": {**SPARSE, "biases": True},
}


def train_on(raw: dict[str, Any], device: str) -> list[tuple[float, float]]:
    import torch

    return train(raw, take_device() if device == "gpu" else torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_the_run_is_that_of_the_cpu(world: World, note: Callable[..., None], name: str) -> None:
    worst = {}
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 3e-2)):
        raw = case(model={"moe": CASES[name]}, training={"precision": precision, "steps": 4})
        (here,), (there,) = (world.run(1, train_on, raw, device) for device in ("cpu", "gpu"))
        pairs = [pair for step in zip(here, there, strict=True) for pair in zip(*step, strict=True)]
        worst[precision] = max(abs(a / b - 1) for a, b in pairs)
        assert worst[precision] <= tolerance
    note(**worst)


def test_one_kernel_does_all_experts(world: World, note: Callable[..., None]) -> None:
    model = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "moe": {**SPARSE, "ffn_hidden_size": 64}}
    (names,) = world.run(1, operations, case(model=model, training={"precision": "bf16"}))
    note(operations=[name for name in names if "group" in name])
    assert any("grouped_mm" in name for name in names) != on_cpu()
