"""What a record says of the steps since the last one, also of a run that was killed between two records."""

from __future__ import annotations

import json
import shutil
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World

STEPS, SAVED = 8, 6


def run(raw: dict[str, Any], root: str, spoilt: int) -> list[tuple[float, float]]:
    """Train to the end by the real loop, with a loss that is not finite at step `spoilt`.

    Returns:
        Loss and gradient norm of each step.
    """
    made, seen = trainer(raw, root), []

    def step(*arguments: Any, real: Any = made.step.run) -> Any:
        result = real(*arguments)
        seen.append((result.loss, result.grad_norm))
        return result

    made.step.run = step
    made._batches = lambda *_: (batch(made) for _ in repeat(None))
    made.faults.at_step = lambda number: float("nan") if number == spoilt else 1.0
    made.resume("auto")
    made.run()
    return seen


def curve(root: Path) -> list[tuple[int, Any, Any, Any]]:
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["loss_last"], record["grad_norm"]) for record in records]


def recipe(every: int) -> dict[str, Any]:
    logging = {"every": every, "wandb": {"mode": "disabled"}}
    raw = {**case(training={"steps": STEPS}), "logging": logging, "checkpoint": {"every": SAVED, "keep": 3}}
    return {**raw, "topology": {"tp": 2, "dp": 1}}


def mean(seen: list[tuple[float, float]], steps: list[int]) -> tuple[float, float]:
    losses, norms = zip(*(seen[step - 1] for step in steps), strict=True)
    return sum(losses) / len(steps), sum(norms) / len(steps)


@pytest.mark.parametrize("spoilt", [0, 3])
def test_a_record_is_the_mean_since_the_last_and_a_resumed_run_repeats_it(
    world: World, tmp_path: Path, spoilt: int
) -> None:
    seen, _ = world.run(2, run, recipe(4), str(tmp_path), spoilt)
    found = curve(tmp_path)
    windows = [[1], [step for step in (2, 3, 4) if step != spoilt], [5, 6, 7, 8]]
    for (_, loss, last, norm), steps in zip(found, windows, strict=True):
        assert (loss, norm) == pytest.approx(mean(seen, steps), rel=1e-12)
        assert last == seen[steps[-1] - 1][0]
    assert [step for step, *_ in found] == [1, 4, 8]
    shutil.rmtree(tmp_path / f"checkpoints/step-{STEPS:08}")  # as if it had been killed after step 6, amid a window
    world.run(2, run, recipe(4), str(tmp_path), spoilt)
    assert curve(tmp_path) == found


def test_a_record_a_step_is_that_step(world: World, tmp_path: Path) -> None:
    seen, _ = world.run(2, run, recipe(1), str(tmp_path), 3)
    expected = [(step, loss, loss, norm) for step, (loss, norm) in enumerate(seen, 1)]
    assert expected[2][1] != expected[2][1], "step 3 is spoilt"
    expected[2] = (3, None, None, None)
    assert curve(tmp_path) == expected


def test_records_tell_the_load_of_experts(world: World, tmp_path: Path) -> None:
    """At the steps with a record, of the whole model on whatever rank its layers are."""
    moe = {"experts": 4, "top_k": 2, "ffn_hidden_size": 16, "dense_layers": 1, "bias_rate": 0.01, "aux_loss": 0.1}
    raw = {**recipe(4), "model": {**recipe(4)["model"], "num_layers": 4, "moe": moe}}
    raw["topology"] = {"tp": 1, "dp": 1, "pp": 2}
    world.run(2, run, raw, str(tmp_path), 0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 4, 8]
    for record in records:
        found = {key.removeprefix("moe/"): value for key, value in record.items() if key.startswith("moe/")}
        assert found["dropped"] == 0 and 1 <= found["load_max"] <= 4 and 0 < found["load_entropy"] <= 1
        layers = [{key for key in found if key.startswith(f"layer_{n}/")} for n in range(4)]
        assert [len(layer) for layer in layers] == [0, 5, 5, 5]
        assert found["load_max"] == max(found[f"layer_{n}/load_max"] for n in (1, 2, 3))
        assert found["aux_loss"] == pytest.approx(sum(found[f"layer_{n}/aux_loss"] for n in (1, 2, 3)))
        assert all(-0.01 * record["step"] <= found[f"layer_{n}/bias_min"] < 1e-6 for n in (1, 2, 3))


def test_what_is_done_every_so_many_tokens_or_samples_is_done_when_they_are_consumed(
    world: World, tmp_path: Path
) -> None:
    """8 samples of 32 tokens a step: a step that goes past a multiple ends with a record, or a checkpoint."""
    raw = {**recipe(1), "topology": {"dp": 1}, "training": {**recipe(1)["training"], "steps": None, "tokens": 2000}}
    raw["logging"] = {"every": "600 tokens", "wandb": {"mode": "disabled"}}
    raw["checkpoint"] = {"every": "20 samples", "keep": 1, "keep_every": "40 samples", "async": False}
    world.run(1, run, raw, str(tmp_path), 0)
    assert [step for step, *_ in curve(tmp_path)] == [1, 3, 5, 8]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [3, 5, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000008"]
