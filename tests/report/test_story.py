"""What happened in a run, and what differs between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.made_runs import BEGAN, make_run
from tests.recipes import case
from tplaunch.report.compare import MISSING, differences, measures
from tplaunch.report.curves import Curves
from tplaunch.report.prediction import figures, memory_by_stage, read_plan
from tplaunch.report.story import attempts, gathered, marks
from tplaunch.units import GiB

EVENTS: list[dict[str, Any]] = [
    {"event": "attempt", "time": BEGAN, "attempt": 1, "job": "7", "nodes": ["n1"]},
    {"event": "start", "time": BEGAN + 5, "attempt": 1, "world_size": 8},
    *({"event": "checkpoint", "time": BEGAN + 10 + step, "step": step} for step in (10, 20, 30)),
    {"event": "loss_spike", "time": BEGAN + 43, "step": 33, "loss": 9.0, "median": 2.0},
    {"event": "attempt_end", "time": BEGAN + 50, "code": 1, "attempt": 1, "job": "7", "why": "rank 3 failed"},
    {"event": "changed", "time": BEGAN + 60, "changes": {"topology.tp": [2, 4], "odd": 3}},
    {"event": "attempt", "time": BEGAN + 61, "attempt": 2},
    {"event": "resume", "time": BEGAN + 70, "step": 30},
    {"event": "of another version", "time": BEGAN + 71, "step": 31},
    {"event": "checkpoint", "time": BEGAN + 80, "step": 10**30},
]


def test_attempts_know_what_changed_and_how_they_ended(tmp_path: Path) -> None:
    first, second = attempts(make_run(tmp_path / "run", records=40, events=EVENTS).history())
    assert (first.job, first.nodes, first.code, first.why, first.checkpoints) == (
        "7",
        ["n1"],
        1,
        "rank 3 failed",
        [10, 20, 30],
    )
    assert (second.step, second.ended, second.changes) == (30, None, {"topology.tp": [2, 4]})


def test_an_attempt_that_another_followed_does_not_go_on(tmp_path: Path) -> None:
    events = [{"event": "attempt", "time": BEGAN + after, "attempt": after + 1} for after in (0, 1)]
    first, second = attempts(make_run(tmp_path / "run", records=2, events=events).history())
    assert first.why.startswith("killed") and not second.why


def test_events_lie_where_they_happened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=40, events=EVENTS)
    found = marks(run.history(), Curves.of(run))
    places = [(mark.kind, mark.step) for mark in found]
    assert ("loss", 33) in places
    assert ("fault", 40) in places  # the attempt's end, by its time: after the record of step 40
    assert [step for kind, step in places if kind == "attempt"] == [0, 30]
    assert max(step for _, step in places) == 40
    texts = [mark.text for mark in gathered(found)]
    assert "3 checkpoints, of steps 10 to 30" in texts
    assert "loss 9.0000 at step 33 is a spike: the median before it is 2.0000" in texts


def test_recipes_differ_by_dotted_key(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", records=1, recipe=case(2, 2, 2, model={"num_layers": 8}))
    two = make_run(tmp_path / "b", records=1, lr=1e-3, recipe=case(4, 1, 2, model={"num_layers": 8}))
    found = differences([one, two])
    assert found["topology.tp"] == [2, 4] and found["optimizer.lr"] == [3e-3, 1e-3]
    assert found["topology.stage_layers"] == [[4, 4], [8]]
    assert "name" not in found and "training.seed" not in found
    two.recipe.unlink()
    assert differences([one, two])["topology.tp"] == [2, MISSING]


def test_curves_are_compared_at_equal_step_and_tokens(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, records=count, every=2, seed=count) for name, count in (("a", 50), ("b", 30))]
    curves = [Curves.of(run) for run in runs]
    found = {one.name: one for one in measures(curves)}
    at = found["loss at step 60"]
    assert at.values == [dict(one.points("loss"))[60] for one in curves]
    assert found["loss at 31.46M tokens"].values == at.values  # both read as many tokens a step
    assert found["final loss"].values[0] == curves[0].points("loss")[-1][1]
    assert found["best loss"].values == [min(y for _, y in one.points("loss")) for one in curves]
    assert found["final validation loss"].values[1] is None


def test_prediction_beside_measurement(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=20)
    assert read_plan(run)[0] is None
    memory = [{"weights": 1.0, "total": 3 * GiB, "allocated": 2 * GiB}, {"total": 5 * GiB, "allocated": 4 * GiB}]
    plan = {"gpu": "h100-80gb", "step_seconds": 0.5, "tokens_per_s": 1e6, "mfu": 0.5, "memory_bytes": 80 * GiB}
    (run.root / "plan.json").write_text(json.dumps({**plan, "memory": memory}))
    with run.metrics.open("a") as file:
        file.write('{"step": 21, "memory/pp0_peak_gib": 2.5, "memory/pp1_peak_gib": 5.0}\n')
    found, curves = read_plan(run)[0], Curves.of(run)
    by_name = {one.name: one for one in figures(found, curves, 20)}
    assert by_name["step"].ratio == 2.0 and by_name["memory of the fullest rank"].predicted == 4.0
    assert [(one.predicted, one.measured) for one in memory_by_stage(found, curves)] == [(2.0, 2.5), (4.0, 5.0)]
    (run.root / "plan.json").write_text(json.dumps({**plan, "memory": "much"}))
    assert read_plan(run)[0] is None


def test_a_plan_is_made_where_the_recipe_names_its_gpu(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=2, recipe={**case(2, 2, 2), "hardware": {"gpu": "h100-80gb"}})
    plan, why = read_plan(run)
    assert plan is not None and plan["gpu"] == "h100-80gb" and len(plan["memory"]) == 2 and why == ""
