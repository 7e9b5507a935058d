"""What a pipeline rank holds follows from the microbatches in flight, not from their number."""

from __future__ import annotations

import pytest

from tests.measure import peaks
from tests.recipes import case, resolved
from tests.world import World
from tplaunch.plan.activations import stage_activations
from tplaunch.plan.case import Case
from tplaunch.spec.gpu import GPUS
from tplaunch.spec.schedules import SCHEDULES

NORM = {"norm": "layernorm"}  # torch runs RMSNorm as several operations on the CPU, which keep more than planned
RAMP = [8, 12, 24, 8]


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        *((schedule, "none") for schedule in sorted(SCHEDULES.keys() - {"gpipe"})),
        ("interleavedzerobubble", "cheap"),  # the graph outlives the half that has used most of it
    ],
)
def test_more_microbatches_take_no_more_memory(world: World, schedule: str, recompute: str) -> None:
    """Nor does a batch that grows and shrinks again leave anything."""
    raw = case(1, 2, schedule=schedule, training={"micro_batch_size": 1, "recompute": recompute})
    first, *later = zip(*world.run(2, peaks, raw, RAMP), strict=True)
    for now in later:
        assert now == pytest.approx(first, rel=0.01)


def test_gpipe_holds_what_each_microbatch_needs_for_its_backward_pass_alone(world: World) -> None:
    raw = case(1, 2, schedule="gpipe", training={"micro_batch_size": 1}, model=NORM)
    planned = Case(resolved(raw), GPUS["h100-80gb"])
    for rank, (few, *_, many, again) in enumerate(world.run(2, peaks, raw, RAMP)):
        assert again == pytest.approx(few, rel=0.01)
        (stage,) = planned.stages_on(rank)
        assert (many - few) / 16 == pytest.approx(stage_activations(planned, stage), rel=0.01)
