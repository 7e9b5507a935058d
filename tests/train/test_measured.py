"""What records hold of norms, times and ranks, and that steps without a record pay nothing for it."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import BATCH, SEQ, case
from tests.training import batch, trainer
from tests.world import World

STEPS, EVERY = 9, 4
ON = {"every": EVERY, "per_rank_every": EVERY, "tensorboard": True, "wandb": {"mode": "offline"}}
OFF = {"every": EVERY, "wandb": {"mode": "disabled"}}


def recipe(logging: dict[str, Any], **topology: Any) -> dict[str, Any]:
    raw = {**case(training={"steps": STEPS}), "logging": logging}
    rates = {"warmup_steps": 2, "min_lr": 1e-3}
    return {**raw, "topology": {"tp": 2, "dp": 1, **topology}, "lr_schedule": rates}


def run(raw: dict[str, Any], root: str, spoilt: int = 0) -> None:
    """Train to the end by the real loop, with a loss that is not finite at step `spoilt`.

    A second of its clock is a question what time it is: how busy the machine is says nothing.
    """
    made = trainer(raw, root)
    seconds = itertools.count()
    time.perf_counter = lambda: float(next(seconds))  # this process ends with the case
    made._batches = lambda *_: (batch(made) for _ in itertools.repeat(None))
    made.faults.at_step = lambda number: float("nan") if number == spoilt else 1.0
    made.resume("auto")
    made.run()


def count(raw: dict[str, Any], root: str) -> list[dict[str, int]]:
    """The collectives of each step, from the fetching of its batch to that of the next, by name."""
    from tplaunch.torch_private import TorchDispatchMode

    made, found = trainer(raw, root), []

    class Counting(TorchDispatchMode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                found[-1][func.__name__] += 1
            return func(*args, **(kwargs or {}))

    def batches(*_: Any) -> Any:
        while True:
            found.append(Counter())
            yield batch(made)

    made._batches = batches
    made.faults.at_step = lambda number: 1.0
    made.resume("auto")
    found.append(Counter())  # what comes before the first batch
    with Counting():
        made.run()
    return [dict(names) for names in found[1:]]


def records(root: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "topology", [{"tp": 1, "dp": 2, "zero": 1}, {"tp": 1, "dp": 2, "zero": 3}], ids=["zero1", "zero3"]
)
def test_steps_without_a_record_have_no_further_collective(
    world: World, tmp_path: Path, topology: dict[str, Any]
) -> None:
    on, _ = world.run(2, count, recipe(ON, **topology), str(tmp_path / "on"))
    off, _ = world.run(2, count, recipe(OFF, **topology), str(tmp_path / "off"))
    recorded = {1, EVERY, 2 * EVERY, STEPS}
    assert len(on) == len(off) >= STEPS - 1
    plain = [sum(names.values()) for step, names in enumerate(on, 1) if step not in recorded]
    assert plain and min(plain) > 0, "nothing was counted"
    assert on == off, "what is measured of ranks and blocks costs a collective of its own"
    assert any("reduce" in name for name in on[1])
    for step in recorded - {1, STEPS}:  # the first step makes groups, the last saves a checkpoint
        assert sum(on[step - 1].values()) <= plain[0] + 2


def test_a_record_holds_what_is_measured(world: World, tmp_path: Path) -> None:
    world.run(2, run, recipe({**OFF, "per_rank_every": EVERY}), str(tmp_path), 2)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [1, 4, 8, 9]
    for record in found:
        step = record["step"]
        assert record["samples"] == step * BATCH and record["tokens"] == step * BATCH * SEQ
        assert record["batch_size"] == BATCH and record["attempt"] == 1
        assert record["skipped_steps"] == (step >= 2)
        assert record["lr_decay"] == record["lr_no_decay"] == record["lr"] > 0
        assert 0 < record["update_ratio"] < 1 < record["param_norm"]
        parts = [record[f"time/{part}_s"] for part in ("data", "forward_backward", "gradients", "update")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(record["step_time_s"])
        blocks = [key for key in record if key.startswith("grad_norm/")]
        assert bool(blocks) == (step != 1)
    assert sum(found[-1][key] ** 2 for key in blocks) == pytest.approx(found[-1]["grad_norm"] ** 2, rel=1e-5)
    rows = records(tmp_path, "ranks.jsonl")
    assert [(row["step"], row["rank"], row["tp"]) for row in rows] == [(s, r, r) for s in (4, 8, 9) for r in (0, 1)]
    assert all(row["host"] and row["memory_peak_gib"] > 0 and row["forward_backward_s"] > 0 for row in rows)
    assert found[-1]["memory/pp0_peak_gib"] == max(row["memory_peak_gib"] for row in rows[-2:])


def test_a_skipped_step_has_no_update(world: World, tmp_path: Path) -> None:
    world.run(2, run, recipe({**OFF, "every": 1}), str(tmp_path), 3)
    assert [record["step"] for record in records(tmp_path) if "update_ratio" not in record] == [3]


def test_a_resumed_run_writes_each_row_once(world: World, tmp_path: Path) -> None:
    raw = {**recipe({**OFF, "per_rank_every": 1}), "checkpoint": {"every": 6}}
    world.run(2, run, raw, str(tmp_path))
    before = [(row["step"], row["rank"]) for row in records(tmp_path, "ranks.jsonl")]
    shutil.rmtree(tmp_path / f"checkpoints/step-{STEPS:08}")
    world.run(2, run, raw, str(tmp_path))
    assert [(row["step"], row["rank"]) for row in records(tmp_path, "ranks.jsonl")] == before
