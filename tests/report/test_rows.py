"""How runs stand, as `tplaunch runs list` says it; which are chosen, and in which order."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.made_runs import make_run
from tplaunch.errors import TplaunchError
from tplaunch.report.choose import choose, order
from tplaunch.report.rows import Row, rows_of, short_history
from tplaunch.run.directory import RunDir
from tplaunch.run.events import AttemptEnded, Saved, Straggled
from tplaunch.slurm import client
from tplaunch.slurm.runs import stand_of

ATTEMPT = {"event": "attempt", "time": 5.0, "attempt": 1}
STARTED = {"event": "start", "time": 6.0, "attempt": 1, "world_size": 8}


def end(code: int, why: str = "") -> dict[str, Any]:
    return {"event": "attempt_end", "time": 9.0, "code": code, "attempt": 1, "why": why}


def row(run: RunDir) -> Row:
    return rows_of([run], run.root.parent)[0][0]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "new"),
        ([ATTEMPT, STARTED], "failed"),  # it ended without a word
        ([ATTEMPT, STARTED, end(0)], "done"),
        ([ATTEMPT, STARTED, end(1, "rank 3 failed")], "failed"),
        ([ATTEMPT, STARTED, end(75, "asked to stop")], "stopped"),
        ([ATTEMPT, STARTED, end(75, "preempted")], "preempted"),
        ([ATTEMPT, STARTED, end(99, "of another version")], "failed"),
    ],
)
def test_states(tmp_path: Path, events: list[dict[str, Any]], state: str) -> None:
    assert row(make_run(tmp_path / "run", records=3, events=events)).state == state


def test_a_run_that_is_held_goes_on_and_a_silent_one_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=3, events=[ATTEMPT, STARTED])
    beat = run.beat(run.next_attempt(), 0)
    beat.write_text("3 0 data\n")
    with run.lock():
        assert (row(run).state, row(run).why) == ("running", "")
        os.utime(beat, (time.time() - 900,) * 2)
        assert row(run).why == "no sign of life for 15m00s"
    assert row(run).state == "failed"


def test_a_run_on_another_machine_goes_on_while_its_heart_beats(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=3, events=[ATTEMPT, STARTED])
    beat = run.beat(run.next_attempt(), 0)
    beat.write_text("3 0 data\n")
    run.lock_file.write_text('{"pid": 1, "host": "elsewhere"}\n')
    assert row(run).state == "running"
    os.utime(beat, (time.time() - 900,) * 2)
    assert row(run).state == "failed"
    os.utime(beat)
    run.lock_file.write_text(json.dumps({"pid": 1, "host": os.uname().nodename}) + "\n")
    assert row(run).state == "failed"  # here the lock would say so


def test_jobs_are_asked_about_once_and_a_cluster_that_is_away_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = {"event": "submit", "time": 1.0, "jobs": ["7"], "logs": [""]}
    runs = [make_run(tmp_path / name, records=0, events=[submitted]) for name in "ab"]
    asked: list[list[str]] = []

    def find_jobs(jobs: list[str]) -> dict[str, client.Standing]:
        asked.append(jobs)
        return {"7": client.Standing(id="7", state="PENDING", reason="Priority", nodes="", restarts=0)}

    monkeypatch.setattr(client, "find_jobs", find_jobs)
    rows, trouble = rows_of(runs, tmp_path)
    assert ([one.state for one in rows], trouble, asked) == (["pending"] * 2, "", [["7", "7"]])

    def away(jobs: list[str]) -> dict[str, client.Standing]:
        raise TplaunchError("squeue is not installed here")

    monkeypatch.setattr(client, "find_jobs", away)
    rows, trouble = rows_of(runs, tmp_path)
    assert ([one.state for one in rows], trouble) == (["gone"] * 2, "squeue is not installed here")


def test_a_list_reads_no_thousands_of_events(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=3, events=[ATTEMPT, STARTED])
    for step in range(1, 2001):
        run.append(Saved(step, "path", 1.0, time=20.0 + step))
        run.append(Straggled(step, 1, 0, 1, 0, 0, 2.0, time=20.0 + step))
    short = short_history(run)
    assert len(short.events) == 3
    jobs: dict[str, client.Standing] = {}
    assert stand_of(run, short, jobs) == stand_of(run, run.history(), jobs)
    assert "the newest checkpoint is of step 2000" in row(run).why
    run.append(AttemptEnded(0, 1))
    assert row(run).state == "done"


def test_figures_and_names(tmp_path: Path) -> None:
    found = row(make_run(tmp_path / "sweep" / "lr-1", records=100, every=10, steps=5000))
    assert (found.step, found.steps, found.topology) == (1000, 5000, "tp2 pp2 dp2")
    assert found.value("validation/loss") is not None and found.value("optimizer.lr") == 3e-3
    assert rows_of([RunDir(tmp_path / "sweep" / "lr-1")], tmp_path)[0][0].name == "sweep/lr-1"


def test_files_that_were_spoilt_spoil_no_list(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", records=3)
    run.recipe.write_bytes(b"\xff\xfe: [")
    run.events.write_bytes(b"[" * 100_000 + b'\n{"event": "attempt_end", "code": "x"}\n{"event": 3}\n\xff\n')
    run.metrics.write_bytes(b'{"step": 1e400}\n{"step": 4, "loss": 1}\n' + b"[" * 100_000 + b"\n")
    found = row(run)
    assert (found.step, found.steps, found.topology, found.state) == (4, None, "", "new")


def made(name: str, **values: Any) -> Row:
    own = {"state": "done", "job": "", "attempt": 1, "step": 5, "steps": 9, "loss": None, "tokens_per_s": None}
    own |= {"topology": "tp1", "age": None, "updated": None, "why": "", "metrics": {}, "recipe": {}}
    return Row(run=Path(name), name=name, **(own | values))


ROWS = [
    made("a", loss=2.0, recipe={"optimizer.lr": 1e-3, "model.qk_norm": True}),
    made("b-1", loss=1.0, recipe={"optimizer.lr": 3e-4, "model.qk_norm": False}, metrics={"mfu": 0.5}),
    made("b-2", state="failed", recipe={"optimizer.lr": 3e-4, "checkpoint.initial": None}),
]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ([], "a b-1 b-2"),
        (["state=failed"], "b-2"),
        (["state != failed"], "a b-1"),
        (["name=b-*"], "b-1 b-2"),
        (["optimizer.lr=0.0003"], "b-1 b-2"),
        (["optimizer.lr>=3e-4", "loss<2"], "b-1"),
        (["loss>=1"], "a b-1"),
        (["mfu>0.4"], "b-1"),
        (["model.qk_norm=true"], "a"),
        (["checkpoint.initial=null", "state=failed"], "b-2"),
        (["step=5"], "a b-1 b-2"),
    ],
)
def test_filters(filters: list[str], names: str) -> None:
    assert " ".join(one.name for one in choose(ROWS, filters)) == names


@pytest.mark.parametrize(
    ("filters", "words"),
    [(["loss"], "no filter"), (["optimiser.lr=1"], "optimizer.lr"), (["loss<low"], "no number")],
)
def test_filters_that_are_none(filters: list[str], words: str) -> None:
    with pytest.raises(TplaunchError, match=words):
        choose(ROWS, filters)


def test_orders() -> None:
    assert [one.name for one in order(ROWS, "loss")] == ["b-1", "a", "b-2"]
    assert [one.name for one in order(ROWS, "-loss")] == ["a", "b-1", "b-2"]
    assert [one.name for one in order(ROWS, "-name")] == ["b-2", "b-1", "a"]
    with pytest.raises(TplaunchError, match="no run has 'los'"):
        order(ROWS, "los")
    assert order([], "anything") == []
