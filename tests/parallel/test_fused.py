"""Asynchronous tensor parallelism: matmuls fused with their collectives. The fused operations have kernels for CUDA
only; here torch's own reference of them stands in on the CPU, which proves how they are put together, not how fast
or whether the kernels are right.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.recipes import BATCH, STEPS, case
from tests.train.test_topology_invariance import plain, train
from tests.world import World

SETTINGS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp4-fewer-kv-heads": {"tp": 4},
    "tp2-pp2-zero-bubble": {"tp": 2, "pp": 2, "schedule": "interleavedzerobubble"},
    "tp2-dp2-zero3-full": {"tp": 2, "dp": 2, "zero": 3, "training": {"recompute": "full"}},
}


def fused(raw: dict[str, Any]) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """The curve of a rank that has the fused operations, and how often it called each."""
    import torch
    from torch.distributed import _symmetric_memory as symmetric

    import tplaunch.parallel.mesh as mesh

    calls: Counter[str] = Counter()
    library = torch.library.Library("symm_mem", "IMPL", "CPU")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        reference = getattr(symmetric, f"_{name}_fallback")

        def counted(*args: Any, _name: str = name, _reference: Any = reference, **keywords: Any) -> Any:
            calls[_name] += 1
            return _reference(*args, **keywords)

        library.impl(name, counted)
    mesh.has_fused_matmuls = lambda device: True
    return train(raw), dict(calls)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tp4-fewer-kv-heads" else pytest.mark.slow) for name in SETTINGS]
)
def test_curve_is_that_of_one_process(world: World, name: str) -> None:
    raw = case(**SETTINGS[name], sequence_parallel=True, async_tp=True)
    (reference,) = world.run(1, train, plain(raw))
    topology = raw["topology"]
    ranks = world.run(topology["tp"] * topology["pp"] * topology["dp"], fused, raw)
    for curve, calls in ranks:
        for ours, theirs in zip(curve, reference, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        # Two regions a block: each is entered by a gather and left by a scatter, and the other way round backward.
        regions = 2 * raw["model"]["num_layers"] // topology["pp"]
        microbatches = BATCH // topology["dp"] // raw["training"]["micro_batch_size"]
        # Made again, a region is entered once more; of the two of a block only attention's is left once more.
        full = raw["training"].get("recompute") == "full"
        each = regions * microbatches * STEPS
        assert calls == {
            "fused_all_gather_matmul": (3 if full else 2) * each,
            "fused_matmul_reduce_scatter": (5 if full else 4) * each // 2,
        }


def test_off_without_cuda(world: World) -> None:
    curve, _ = world.run(2, train, case(2, sequence_parallel=True, async_tp=True))  # else torch has no kernel to call
    assert len(curve) == STEPS
