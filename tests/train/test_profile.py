"""Profiles of the steps that the recipe names, or that a signal asks for."""

from __future__ import annotations

import gzip
import json
import os
import signal
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World
from tplaunch.files import read_lines

STEPS = 8


def run(raw: dict[str, Any], root: str, signals: dict[int, int]) -> list[int]:
    """Train to the end by the real loop; SIGUSR2 comes to this rank in the steps that have its number.

    Returns:
        The steps before which the profile was looked at.
    """
    import torch.distributed as dist

    made, looked = trainer(raw, root), []

    def at_step(step: int) -> float:
        if signals.get(step) == dist.get_rank():
            os.kill(os.getpid(), signal.SIGUSR2)
        return 1.0

    def turn(step: int, real: Any = made.profile.turn) -> None:
        looked.append(step)
        real(step)

    made.faults.at_step, made.profile.turn = at_step, turn
    made._batches = lambda *_: (batch(made) for _ in repeat(None))
    made.resume("auto")
    made.run()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    return looked


def recipe(**profile: Any) -> dict[str, Any]:
    logging = {"wandb": {"mode": "disabled"}, "profile": profile}
    return {**case(training={"steps": STEPS}), "logging": logging, "topology": {"tp": 2, "dp": 1}}


def events(root: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(root / "events.jsonl") if event["event"] == name]


def steps_of(root: Path) -> list[tuple[int, int, int]]:
    """(rank, first step, last step) of each profile, whose trace holds as many steps of the optimizer."""
    found = []
    for event in events(root, "profiled"):
        trace = json.loads(gzip.decompress(Path(event["trace"]).read_bytes()))
        names = [entry.get("name", "") for entry in trace["traceEvents"]]
        assert "aten::mm" in names
        # The token embedding's look-up is once in a microbatch, of which this recipe has two.
        assert names.count("aten::embedding") == 2 * (event["last"] - event["first"] + 1)
        assert trace["distributedInfo"]["rank"] == event["rank"]
        found.append((event["rank"], event["first"], event["last"]))
    return found


def test_the_steps_of_the_ranks_that_the_recipe_names(world: World, tmp_path: Path) -> None:
    looked = world.run(2, run, recipe(steps=[3, 4], ranks=[1]), str(tmp_path), {})
    assert looked == [[], [3, 5]], "nothing is done at other steps"
    assert steps_of(tmp_path) == [(1, 3, 4)]
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step-00000003-to-00000004-rank-1.json.gz"]


def test_a_range_that_ends_with_the_run_and_one_that_a_resumed_run_is_past(world: World, tmp_path: Path) -> None:
    world.run(2, run, recipe(steps=[STEPS, STEPS]), str(tmp_path), {})
    assert steps_of(tmp_path) == [(0, STEPS, STEPS)]
    later = recipe(steps=[7, STEPS])
    later["training"]["steps"] = STEPS + 2
    world.run(2, run, later, str(tmp_path), {})
    assert len(steps_of(tmp_path)) == 1


@pytest.mark.parametrize(("profile", "last"), [({}, 4), ({"steps": [6, 8]}, 5)], ids=str)
def test_a_signal_asks_for_the_next_steps(world: World, tmp_path: Path, profile: dict[str, Any], last: int) -> None:
    """As many as the recipe's range has; else two. A rank that is not listed ignores it."""
    world.run(2, run, recipe(**profile), str(tmp_path), {1: 1, 2: 0})
    assert steps_of(tmp_path) == [(0, 3, last), *([(0, 6, 8)] if profile else [])]


def test_a_signal_during_a_profile_asks_for_another_after_it(world: World, tmp_path: Path) -> None:
    world.run(2, run, recipe(steps=[2, 4]), str(tmp_path), {3: 0})
    assert steps_of(tmp_path) == [(0, 2, 4), (0, 5, 7)]


def test_a_profile_that_cannot_be_written_ends_no_run(world: World, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    world.run(2, run, recipe(steps=[2, 2]), str(tmp_path), {})
    (failed,) = events(tmp_path, "profile_failed")
    assert failed["rank"] == 0 and "FileExistsError" in failed["why"]
    assert events(tmp_path, "done")
