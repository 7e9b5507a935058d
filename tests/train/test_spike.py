"""Loss spikes: seen, rolled back from, and decided alike by a run that was killed in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World
from tplaunch.recipe.schema import LossSpike
from tplaunch.train.spike import find_spike

SAVED, SPIKE, END = 4, 6, 9


def test_what_a_spike_is() -> None:
    rule = LossSpike(factor=1.5, window=3)
    window: list[float] = []
    for loss in (4.0, 9.0, 3.0, 6.0):  # the window fills; 6.0 is 1.5 times the median, no more
        median, window = find_spike(loss, window, rule)
        assert median is None
    assert window == [9.0, 3.0, 6.0]
    assert find_spike(9.1, window, rule) == (6.0, [])
    window = []
    for _ in range(4):
        median, window = find_spike(50.0, window, rule)
        assert median is None
    assert find_spike(9.0, [4.0, 5.0, 6.0, 1.0], rule) == (4.5, []), "a window that was longer before the run resumed"


def run(raw: dict[str, Any], root: str) -> list[tuple[int, float, float, int]]:
    """Train from the newest checkpoint to step `END`, with ten times the loss at `SPIKE`, and save at `SAVED`.

    Returns:
        (step, loss, gradient norm, updates that the optimizer's bias correction counts) of each step.
    """
    made, curve = trainer(raw, root), []
    made.resume("auto")
    while made.progress.step < END:
        result = made.step.run(batch(made), 10.0 if made.progress.step + 1 == SPIKE else 1.0)
        (updates,) = {int(state["step"]) for state in made.step.optimizer.parts["adamw"].state.values()}
        curve.append((made.progress.step, result.loss, result.grad_norm, updates))
        made.handle_bad_step(result)
        if made.progress.step == SAVED:
            made.save(wait=True)
    return curve


@pytest.mark.parametrize("topology", [{"tp": 2, "dp": 1}, {"pp": 2, "dp": 1}, {"dp": 2, "zero": 3}], ids=str)
def test_rolled_back_and_again_after_a_kill(world: World, tmp_path: Path, topology: dict[str, Any]) -> None:
    rule = {"loss_spike": {"factor": 2.0, "window": 4}}
    raw = {**case(model={"num_layers": 2}, training=rule), "topology": topology}
    first, other = world.run(2, run, raw, str(tmp_path))
    assert first == other
    assert [updates for *_, updates in first] == [1, 2, 3, 4, 5, 6, SAVED + 1, SAVED + 2, SAVED + 3]
    resumed, _ = world.run(2, run, raw, str(tmp_path))
    assert resumed == first[SAVED:]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    spikes = [event for event in events if event["event"] == "loss_spike"]
    assert [event["step"] for event in spikes] == [SPIKE, SPIKE]
    assert spikes[0]["loss"] == first[SPIKE - 1][1] and spikes[0]["median"] == spikes[1]["median"]
    back = [(event["step"], event["checkpoint"]) for event in events if event["event"] == "rollback"]
    assert back == [(SPIKE, SAVED)] * 2

    left_alone, _ = world.run(2, run, {**case(model={"num_layers": 2}), "topology": topology}, str(tmp_path / "alone"))
    assert left_alone[:SPIKE] == first[:SPIKE] and left_alone[SPIKE:] != first[SPIKE:]
