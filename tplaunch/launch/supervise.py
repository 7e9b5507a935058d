"""Runs attempts of one run until it is done, stopped or given up: the same on this machine and inside a Slurm job.

torchrun's own limit counts all restarts; the limit here counts only restarts without a new checkpoint, so that a run
of weeks may fail any number of times as long as it makes progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tplaunch.errors import Exit
from tplaunch.launch.hook import telling
from tplaunch.run.directory import RunDir
from tplaunch.run.events import AttemptBegan, AttemptEnded
from tplaunch.run.history import History


@dataclass(frozen=True)
class Verdict:
    """What becomes of a launch after an attempt.

    Args:
        code: its exit code, where it ends.
        then: it ends; ranks are started again, here; or its job goes back to the queue.
        last: later jobs of its chain are not wanted.
        why: in words.
    """

    code: Exit
    then: Literal["end", "again", "requeue"]
    why: str
    last: bool = False


def judge(
    history: History,
    *,
    crashed: bool = False,
    asked_to_stop: bool,
    leaving: str = "",
    ended_by: str = "",
    may_restart: bool,
    may_requeue: bool = False,
    give_up_after: int | None = None,
) -> Verdict:
    """Decide after the ranks have ended.

    Args:
        history: of the run, up to now.
        crashed: the ranks ended with an error, whatever they had noted before.
        asked_to_stop: the user has asked this launch to stop.
        leaving: why the launch must leave its nodes soon, in words; "" when it need not.
        ended_by: the state of a job that Slurm itself is ending; "" while it runs.
        may_restart: the limit of restarts is not used up.
        may_requeue: the job may go back to the queue.
        give_up_after: attempts in a row without progress; None: no such limit.
    """
    ending = "failed" if crashed else history.ending
    if ending == "done":
        return Verdict(Exit.DONE, "end", "the last step is done", last=True)
    if ending == "turned" and not (ended_by or leaving or asked_to_stop):
        return Verdict(Exit.DONE, "again", "a part of the run is done: other workers go on")
    ending = "stopped" if ending == "turned" else ending
    code = Exit.STOPPED if ending == "stopped" else Exit.FAILED
    if ended_by:
        return Verdict(code, "end", f"Slurm ends this job itself ({ended_by})")
    back: Literal["end", "requeue"] = "requeue" if may_requeue else "end"
    if ending == "stopped":
        if leaving:
            return Verdict(code, back, f"stopped with a checkpoint: {leaving}")
        return Verdict(code, "end", "stopped with a checkpoint, as was asked", last=True)
    if asked_to_stop:
        return Verdict(code, "end", "ended without a checkpoint when asked to stop", last=True)
    failures = history.failures_since_progress
    if give_up_after is not None and failures >= give_up_after:
        return Verdict(code, "end", give_up(give_up_after), last=True)
    limit = f" of at most {give_up_after}" if give_up_after is not None else ""
    progress = f"attempt {failures}{limit} without a new checkpoint" if failures else "it had made progress"
    return Verdict(code, "again" if may_restart and not leaving else back, f"failed: {progress}")


def give_up(attempts: int) -> str:
    """Why a run is given up, in words."""
    return f"{attempts} attempts in a row have ended without a new checkpoint: giving up"


def supervise(
    run_dir: RunDir,
    run_attempt: Callable[[int], None],
    decide: Callable[[History, bool], Verdict],
    again: Callable[[Verdict, int, int], None],
    *,
    max_restarts: int,
    job: str = "",
    nodes: Sequence[str] = (),
    on_event: str | None = None,
) -> Verdict:
    """Run attempts until one's verdict is not to try again here.

    Args:
        run_dir: the run directory, which the caller holds.
        run_attempt: runs the ranks of an attempt, by its number, and returns when they have ended.
        decide: given the run's history and whether the ranks may be started again, says what comes next.
        again: told before a restart: the verdict, the attempt that ended, and how many restarts that makes without a
            new checkpoint.
        max_restarts: restarts without a new checkpoint in between.
        job, nodes: where it runs, for the events.
        on_event: the recipe's `logging.on_event`.

    Returns:
        The last verdict.
    """
    restarts = 0
    with telling(run_dir, on_event):
        while True:
            attempt = run_dir.next_attempt()
            run_dir.append(AttemptBegan(attempt, job, list(nodes)))
            run_attempt(attempt)
            history = run_dir.history()
            restarts = restarts if history.failures_since_progress else 0
            verdict = decide(history, restarts < max_restarts)
            run_dir.append(AttemptEnded(int(verdict.code), attempt, job, verdict.why))
            if verdict.then != "again":
                return verdict
            if verdict.code is Exit.DONE:
                continue
            restarts += 1
            again(verdict, attempt, restarts)
