"""The story of a run: what follows from its events."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stories import history
from tplaunch.files import append_line
from tplaunch.run.directory import RunDir
from tplaunch.run.events import AttemptEnded, BadNodes, Saved, Started, Submitted
from tplaunch.run.history import History


@pytest.mark.parametrize(
    ("log", "failures"),
    [
        (history(), 0),
        (history("submit", "attempt"), 1),
        (history("attempt", "checkpoint:2"), 0),
        (history("attempt", "checkpoint:2", "attempt", "attempt"), 2),
        (
            history("attempt", "checkpoint:2", "attempt", "checkpoint:2", "attempt"),
            2,
        ),  # the same step again: no progress
        (history("attempt", "checkpoint:2", "attempt", "checkpoint:4", "attempt"), 1),
        (history("attempt", "attempt", "stopped:0", "attempt"), 1),
        (history("attempt", "bad_nodes", "attempt"), 3),
        (history("attempt", "attempt", "attempt", "submit"), 0),  # the user mended it and submitted again
    ],
)
def test_failures_are_counted_since_the_last_progress(log, failures) -> None:
    assert log.failures_since_progress == failures


def test_failures_after_a_run_was_sent_back_to_an_older_checkpoint() -> None:
    sent_back = history("attempt", "checkpoint:8", "attempt", "resume:2", "checkpoint:4", "attempt")
    assert sent_back.failures_since_progress == 1


def test_only_the_latest_attempt_says_how_it_ended() -> None:
    stopped = ["submit", "attempt", "start", "checkpoint:3", "stopped:3"]
    assert history(*stopped).ending == "stopped"
    assert history(*stopped, "attempt", "start").ending == "failed"
    assert history(*stopped, "attempt", "start", "done:8").ending == "done"
    assert not history(*stopped, "attempt").trained
    assert history(*stopped, "attempt", "start").trained


def test_the_launchers_verdict_counts_until_another_attempt_begins() -> None:
    assert history("attempt", "done:8").end is None
    assert isinstance(history("attempt", "done:8", "attempt_end").end, AttemptEnded)
    assert isinstance(history("submit", "bad_nodes").end, BadNodes)
    assert history("attempt", "attempt_end", "submit").end is None


def test_the_latest_submission_counts() -> None:
    story = History([Submitted(["1", "2"], ["a", "b"]), Submitted(["5", "6", "7"], ["c", "", "e"])])
    assert story.submitted_jobs == ["5", "6", "7"]
    assert (story.jobs_after("5"), story.jobs_after("7"), story.jobs_after("1")) == (["6", "7"], [], [])
    assert (story.log_of("7"), story.log_of("1")) == (Path("e"), None)
    assert history().submitted_jobs == []


def test_what_a_restart_by_torchrun_resumes_from() -> None:
    story = [Saved(step=2), Started(attempt=1)]
    assert History(story).resume_source(1, "runs/other/checkpoints/step-00000001").startswith("runs/other")
    assert History([*story, Saved(step=4)]).resume_source(1, "none") == "auto"
    assert History([*story, Saved(step=4)]).resume_source(2, "none") == "none"  # a later attempt, asked anew


def test_events_of_other_versions_and_hands(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    lines = [
        {"event": "start", "time": 1.5, "attempt": 2, "world_size": 8, "later": "field"},
        {"event": "of another version", "time": 2.0},
        {"event": "checkpoint", "time": 3.0, "step": 4, "path": "p", "seconds": 0.5},
        {"event": "checkpoint", "time": 4.0, "step": "edited"},
        {"event": "done"},
    ]
    for line in lines:
        append_line(run.events, line)
    assert run.history().events == [
        Started(time=1.5, attempt=2, world_size=8),
        Saved(time=3.0, step=4, path="p", seconds=0.5),
    ]


def test_an_event_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written = [Submitted(["1"], ["log"]), Saved(3, "p", 1.25), BadNodes(["n2"], "7", {"n2": ["slow"]})]
    for event in written:
        run.append(event)
    assert run.history().events == written
