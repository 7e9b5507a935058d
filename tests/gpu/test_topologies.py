"""Any topology, the same run, on CUDA: several ranks share one GPU, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.machine import take_device
from tests.recipes import case
from tests.train.test_topology_invariance import TOLERANCE, plain, train
from tests.world import World

pytestmark = pytest.mark.gpu
FP64 = {"precision": "fp64"}
CASES: dict[str, dict[str, Any]] = {
    "tp2": case(2),
    "pp2": case(1, 2),
    **{f"dp2-zero{zero}": case(1, 1, 2, zero=zero) for zero in range(4)},
    "fp64-tp2-dp2-sp": case(2, 1, 2, sequence_parallel=True, training=FP64),
    "fp64-tp2-pp2-dp2-zero3": case(2, 2, 2, zero=3, training=FP64),
}


def train_here(raw: dict[str, Any]) -> list[tuple[float, float]]:
    """The curve, by a rank on this machine's device."""
    from tests.gpu import host_sends

    host_sends.install()
    return train(raw, take_device())


@pytest.fixture(scope="module")
def references() -> dict[str, list[tuple[float, float]]]:
    return {}


@pytest.mark.parametrize("name", CASES)
def test_curve_is_that_of_one_process(
    world: World, references: dict[str, list[tuple[float, float]]], note: Callable[..., None], name: str
) -> None:
    raw = CASES[name]
    topology, alone = raw["topology"], plain(raw)
    if repr(alone) not in references:
        (references[repr(alone)],) = world.run(1, train_here, alone)
    curves = world.run(topology["tp"] * topology["pp"] * topology["dp"], train_here, raw)
    assert all(curve == curves[0] for curve in curves), "the ranks do not agree"
    pairs = [pair for step in zip(curves[0], references[repr(alone)], strict=True) for pair in zip(*step, strict=True)]
    worst = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    note(worst_relative_difference=worst)
    assert worst <= TOLERANCE[raw["training"]["precision"]]
    assert curves[0][-1][0] < curves[0][0][0], "nothing was learnt"
