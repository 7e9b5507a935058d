"""Run directories made up: what a training of weeks leaves, without one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.recipes import case, resolved
from tplaunch.recipe.load import dump_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir

BEGAN = 1_790_000_000.0  # unix seconds


def make_run(
    root: Path,
    *,
    records: int = 200,
    every: int = 1,
    steps: int | None = None,
    lr: float = 3e-3,
    seed: int = 0,
    events: list[dict[str, Any]] | None = None,
    spikes: dict[int, float] | None = None,
    began: float = BEGAN,
    recipe: dict[str, Any] | None = None,
) -> RunDir:
    """A run whose loss falls, with noise; its events are those of one attempt that is done, unless given.

    Args:
        records, every: lines of metrics.jsonl, and steps from one to the next.
        steps: of the recipe; default: what the records reach.
        spikes: loss of some records, by their index.
    """
    run = RunDir(root)
    run.create()
    last = records * every
    raw = recipe or case(2, 2, 2, training={"steps": steps or max(1, last)})
    raw = {**raw, "optimizer": {**raw.get("optimizer", {}), "lr": lr}}
    run.recipe.write_text(dump_recipe(resolved(raw)))
    run.metrics.write_text(
        "".join(json.dumps(record) + "\n" for record in made_records(records, every, lr, seed, spikes, began))
    )
    if events is None:
        events = [
            {"event": "attempt", "time": began, "attempt": 1},
            {"event": "start", "time": began + 5, "attempt": 1, "world_size": 8},
            {"event": "done", "time": began + 10 + last, "step": last},
            {
                "event": "attempt_end",
                "time": began + 11 + last,
                "code": 0,
                "attempt": 1,
                "why": "the last step is done",
            },
        ]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def made_records(
    count: int, every: int, lr: float, seed: int, spikes: dict[int, float] | None, began: float
) -> list[dict[str, Any]]:
    """Records as the trainer writes them (DESIGN 5)."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        step = (i + 1) * every
        share = step / (count * every)
        loss = 2.2 + 6 * math.exp(-step / (0.07 * count * every) * (lr / 3e-3) ** 0.3) + rng.gauss(0, 0.03)
        loss = (spikes or {}).get(i, loss)
        record = {
            "step": step,
            "time": began + 10 + step,
            "loss": loss,
            "loss_last": loss + rng.gauss(0, 0.02),
            "grad_norm": 0.4 + 4 * math.exp(-step / (0.05 * count * every)) + abs(rng.gauss(0, 0.05)),
            "lr": lr * min(1, share / 0.05) * (0.55 + 0.45 * math.cos(math.pi * share)),
            "tokens": step * 524_288,
            "tokens_per_s": 524_288 * (1 + rng.gauss(0, 0.02)) * (0.6 if rng.random() < 0.004 else 1),
            "tokens_per_s_per_gpu": 524_288 / 8,
            "step_time_s": 1.0,
            "data_time_s": 0.002,
            "tflops_per_gpu": 410.0,
            "memory_peak_gib": 61.5,
            "flops_total": step * 1e15,
            "mfu": 0.41 + rng.gauss(0, 0.005),
        }
        if i % 50 == 49:
            record["validation/loss"] = loss + 0.05
        found.append(record)
    return found


def recipe_of(run: RunDir) -> Recipe:
    """The recipe of a run."""
    from tplaunch.recipe.load import load_recipe

    return load_recipe(run.recipe).recipe
