"""What a run of stages has read, when it goes on with other ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_dataset import write
from tests.recipes import case, resolved
from tplaunch.data.fingerprint import data_facts
from tplaunch.errors import Exit
from tplaunch.launch.resume import Before, settled_units, stage_changes
from tplaunch.launch.supervise import Verdict, judge, supervise
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import AttemptBegan, CheckpointDamaged, Done, OtherWorkers, Saved, Stopped
from tplaunch.run.history import History
from tplaunch.spec.course import Course
from tplaunch.spec.run_stages import longest_samples

STEP = 50
Stages = list[dict[str, Any]]


def recipe(folder: Path, stages: Stages | None, train: str = "a") -> Recipe:
    """Corpora named by letters, of the same folder; "+" joins them."""

    def data(names: str) -> list[str]:
        for name in names.split("+"):
            if not (folder / f"{name}.bin").exists():
                write(folder / name, [9000], first=10_000 * ord(name[0]) % 7_000)
        return [str(folder / name) for name in names.split("+")]

    named = stages and [{**one, "data": {"train": data(one["data"])}} if "data" in one else one for one in stages]
    return resolved(case(training={"steps": 100, "stages": named}) | {"data": {"train": data(train)}})


def changes(was: Recipe, now: Recipe, folder: Path, **progress: Any) -> dict[str, Any]:
    """What a launch from step 50 finds."""
    known, facts = data_facts(was, folder), data_facts(now, folder)
    known["units"] = longest_samples(was)
    samples = Course(was).first_sample(STEP + 1)
    before = Before(folder, STEP, {}, {"samples": samples, **progress}, was)
    facts["units"] = longest_samples(now) | settled_units(before, known, facts)
    return dict(stage_changes(before, known, now, facts))


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        (None, [{"until": 60}, {"data": "b"}], True),  # a run that had no stages
        ([{"until": 30}, {"data": "a+b"}], [{"until": 30}, {"until": 80, "data": "a+b"}, {"data": "c"}], True),
        ([{"until": 30}, {"data": "a+b"}], [{"until": 30}, {"until": 51, "data": "a+b"}, {"seq_len": 64}], True),
        ([{"until": 30}, {"data": "a+b"}], [{"until": 40}, {"data": "a+b"}], False),
        ([{"until": 30}, {"data": "a+b"}], [{"until": 30}, {"data": "a+c"}], False),
        ([{"until": 30}, {"data": "a+b"}], None, False),
    ],
)
def test_what_was_read_stays_and_what_comes_is_free(
    tmp_path: Path, was: Stages | None, now: Stages | None, same: bool
) -> None:
    found = changes(recipe(tmp_path, was), recipe(tmp_path, now), tmp_path)
    assert (found == {}) == same and set(found) <= {"data.train"}


def test_corpora_may_move(tmp_path: Path) -> None:
    stages: Stages = [{"until": 30}, {"data": "a+b"}]
    was = recipe(tmp_path, stages)
    for name in "ab":
        write(tmp_path / f"{name}moved", [9000], first=10_000 * ord(name) % 7_000)
    now = was.moved({str(tmp_path / name): str(tmp_path / f"{name}moved") for name in "ab"})
    assert changes(was, now, tmp_path) == {}


def test_a_batch_that_was_changed_on_the_way_cannot_go_on_in_stages(tmp_path: Path) -> None:
    stages: Stages = [{"until": 60}, {"data": "b"}]
    found = changes(recipe(tmp_path, None), recipe(tmp_path, stages), tmp_path, samples=333)
    assert found == {"data.train": ("333 samples in 50 steps", "400")}


def test_what_was_read_keeps_the_unit_that_it_was_shuffled_by(tmp_path: Path) -> None:
    was, now = recipe(tmp_path, None), recipe(tmp_path, [{"until": 60}, {"seq_len": 128, "data": "a+b"}])
    known, facts = data_facts(was, tmp_path), data_facts(now, tmp_path)
    known["units"] = longest_samples(was)
    before = Before(tmp_path, STEP, {}, {"samples": 400}, was)
    assert settled_units(before, known, facts) == {str(tmp_path / "a"): 32}
    assert longest_samples(now) == {str(tmp_path / "a"): 128, str(tmp_path / "b"): 128}


TURNED = History([AttemptBegan(1), Saved(10), OtherWorkers(10)])


@pytest.mark.parametrize(
    ("more", "code", "then"),
    [
        ({}, Exit.DONE, "again"),
        ({"may_restart": False}, Exit.DONE, "again"),  # nothing has failed
        ({"asked_to_stop": True}, Exit.STOPPED, "end"),
        ({"leaving": "preempted", "may_requeue": True}, Exit.STOPPED, "requeue"),
        ({"ended_by": "timeout"}, Exit.STOPPED, "end"),
        ({"crashed": True}, Exit.FAILED, "again"),  # a rank died after the others had ended
    ],
)
def test_what_follows_a_part_of_the_run(more: dict[str, Any], code: Exit, then: str) -> None:
    verdict = judge(TURNED, **{"asked_to_stop": False, "may_restart": True, **more})
    assert (verdict.code, verdict.then) == (code, then)
    assert TURNED.ending == "turned" and TURNED.failures_since_progress == 0


def test_other_workers_are_no_restart(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    ends = [[Saved(1), OtherWorkers(1)], [Saved(2), OtherWorkers(2)], [Saved(3), Done(3)]]

    def attempt(number: int) -> None:
        for event in ends[number - 1]:
            run_dir.append(event)

    def decide(history: History, may_restart: bool) -> Verdict:
        return judge(history, asked_to_stop=False, may_restart=may_restart)

    def again(*_: Any) -> None:
        raise AssertionError("a restart")

    assert supervise(run_dir, attempt, decide, again, max_restarts=0).code is Exit.DONE
    assert run_dir.history().attempts == 3


def test_a_damaged_checkpoint_is_not_gone_on_from_again() -> None:
    events = [Saved(1, "c/step-1"), Saved(2, "c/step-2"), CheckpointDamaged("c/step-2", "cut off"), Stopped(1)]
    assert History(events).damaged == {"c/step-2"}
    assert History([*events, Saved(2, "c/step-2")]).damaged == frozenset()
