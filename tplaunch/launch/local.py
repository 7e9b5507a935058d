"""Runs a recipe on this machine: starts torchrun, shows how it goes, ends it in good order, and starts a failed run
again. torchrun's own restarts do not serve: it counts them all, and a run of weeks may fail any number of times as
long as it gets on.

torchrun ends the other workers when one has failed, but waits 30 s for each that does not answer; a worker in a
hung collective does not. Here what is left after a few seconds is killed, so that a failed launch ends within 10 s.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from tplaunch.errors import Exit
from tplaunch.launch import failure
from tplaunch.launch.orphans import LAUNCH_ID, die_with_parent, end_launch, kill, processes_of
from tplaunch.launch.torchrun import WORKER, torchrun_argv, torchrun_environment
from tplaunch.rundir import Record, RunDir

if TYPE_CHECKING:
    from rich.console import Console

    from tplaunch.check import Checked
    from tplaunch.launch.console import RunView

POLL_S = 0.1
SURVIVORS_S = 4.0  # that workers have to end after one has failed, and torchrun after they have
TORCHRUN_S = 10.0  # that torchrun has to end after its workers' grace is over
LEFTOVERS_S = 5.0  # that helpers of workers, such as W&B's, have to end after torchrun has
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # USR1: Slurm's usual warning


class StopRequest:
    """What the user, or a batch system, has asked of this launch by signals.

    Only a second Ctrl-C asks for an end at once: Slurm and others repeat SIGTERM before they send SIGKILL.
    """

    def __init__(self) -> None:
        self.soon = self.now = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.now = self.now or (self.soon and number == signal.SIGINT)
        self.soon = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within the block. Main thread only."""
        before = {number: signal.signal(number, self) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Survivors:
    """Kills the workers that do not end after another has failed, and torchrun if it then stays.

    Args:
        torchrun: its process id.
    """

    def __init__(self, run_dir: RunDir, attempt: int, launch_id: str, torchrun: int) -> None:
        self.run_dir, self.attempt, self.launch_id, self.torchrun = run_dir, attempt, launch_id, torchrun
        self.deadline: float | None = None

    def watch(self, *, stopping: bool) -> None:
        """Looks for a failure, and acts on one that is old enough.

        Args:
            stopping: all workers have been told to end, so that this is no sign of a failure.
        """
        now = time.monotonic()
        if self.deadline is None and self._failed(stopping):
            self.deadline = now + SURVIVORS_S
        if self.deadline is not None and now > self.deadline:
            kill(processes_of(self.launch_id) - {self.torchrun} or {self.torchrun})
            self.deadline = now + SURVIVORS_S

    def _failed(self, stopping: bool) -> bool:
        if any(self.run_dir.attempt_dir(self.attempt).glob("*.error.json")):
            return True
        log = self.run_dir.torchrun_log(self.attempt)
        return not stopping and bool(failure.workers_told_to_end(log.read_text(errors="replace")))


def run_local(checked: Checked, run_dir: RunDir, *, resume: str = "auto", module: str = WORKER) -> Exit:
    """Trains on this machine until the run is done, fails or is stopped; then no process of it is left.

    A failed run is started again, as a new attempt, up to `launch.max_restarts` times without a new checkpoint.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop it in good order: the workers finish their step and save, for which
    they have the recipe's `launch.slurm.grace`. A second Ctrl-C ends it at once.

    Args:
        checked: the recipe, which lies resolved in `run_dir.recipe`.
        run_dir: the run directory, which the caller holds (`RunDir.lock`).
        resume: auto, none, or a checkpoint's path.
        module: what each rank runs.

    Returns:
        DONE, STOPPED (a complete checkpoint is there) or FAILED (the cause has been shown).
    """
    from rich.console import Console

    from tplaunch.launch.console import print_summary

    console, errors = (Console(stderr=e, highlight=False, markup=False, emoji=False) for e in (False, True))
    began, stop, restarts, saved = time.monotonic(), StopRequest(), 0, 0
    with stop.listening():
        while True:
            attempt, before = run_dir.next_attempt(), len(run_dir.read_events())
            code = _attempt(checked, run_dir, attempt, "auto" if saved else resume, module, stop, console)
            events = run_dir.read_events()[before:]
            end = how_it_ended(code, events, asked=stop.soon)
            newest = max((event["step"] for event in events if event["event"] == "checkpoint"), default=0)
            if newest > saved:
                restarts, saved = 0, newest
            if end is not Exit.FAILED or stop.soon or restarts == checked.recipe.launch.max_restarts:
                break
            restarts += 1
            count = f"restart {restarts} of at most {checked.recipe.launch.max_restarts} without a new checkpoint"
            failure.print_cause(errors, failure.find_cause(run_dir, attempt), checked.topology, count)
    if end is not Exit.FAILED:
        if end is Exit.STOPPED:
            console.print(f"stopped; {_again(run_dir)}", soft_wrap=True)
        print_summary(console, run_dir, time.monotonic() - began)
    elif stop.now or (stop.soon and not failure.errors(run_dir, attempt)):
        errors.print(f"ended before it could save; {_again(run_dir)}", soft_wrap=True)
    else:
        failure.print_cause(errors, failure.find_cause(run_dir, attempt), checked.topology, _again(run_dir))
    return end


def _attempt(
    checked: Checked, run_dir: RunDir, attempt: int, resume: str, module: str, stop: StopRequest, console: Console
) -> int:
    """Runs torchrun once, until no process of it is left, and returns its exit code."""
    from tplaunch.launch.console import RunView

    ranks, grace_s, launch_id = checked.topology.world_size, checked.recipe.launch.slurm.grace, uuid.uuid4().hex
    environment = {
        **os.environ,
        **torchrun_environment(ranks, attempt=attempt, resume=resume, grace_s=grace_s, one_node=True),
        "LOGLEVEL": "WARNING",  # torchrun's; its warnings say which workers it ends
        LAUNCH_ID: launch_id,
    }
    with run_dir.torchrun_log(attempt).open("wb") as log:
        view = RunView(checked, run_dir, console)
        process = subprocess.Popen(
            torchrun_argv(run_dir.root, ranks, module=module),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches the launcher only
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        try:
            _attend(process, view, Survivors(run_dir, attempt, launch_id, process.pid), stop, grace_s)
        finally:
            process.kill()
            stuck = end_launch(launch_id, patience_s=0 if stop.now else LEFTOVERS_S)
            view.close()
    if stuck:
        console.print(f"processes {sorted(stuck)} do not end even by SIGKILL: the kernel or a device holds them")
    return process.wait()


def _attend(
    process: subprocess.Popen[bytes], view: RunView, survivors: Survivors, stop: StopRequest, grace_s: float
) -> None:
    """Shows how it goes until torchrun has ended, or must be ended now."""
    stop_by: float | None = None
    while process.poll() is None and not stop.now:
        view.update()
        survivors.watch(stopping=stop_by is not None)
        if stop_by is None and stop.soon:
            view.say(f"stopping after this step and a checkpoint, at most {grace_s:.0f} s; Ctrl-C ends it now")
            process.terminate()
            stop_by = time.monotonic() + grace_s + TORCHRUN_S
        if stop_by is not None and time.monotonic() > stop_by:
            return
        time.sleep(POLL_S)


def how_it_ended(code: int, events: list[Record], *, asked: bool) -> Exit:
    """The exit code of a launch.

    Args:
        code: torchrun's. One that was told to stop exits 1 even if all went well.
        events: what the workers have noted during the launch.
        asked: whether the launch was told to stop.
    """
    names = {event["event"] for event in events}
    if code != 0 and not asked:
        return Exit.FAILED
    if "stopped" in names:
        return Exit.STOPPED
    if code == 0 or "done" in names:
        return Exit.DONE
    return Exit.FAILED if names & {"start", "resume"} else Exit.STOPPED  # before training began nothing is lost


def _again(run_dir: RunDir) -> str:
    saved = [event["step"] for event in run_dir.read_events() if event["event"] == "checkpoint"]
    since = f"goes on after step {saved[-1]}" if saved else "starts from the beginning (there is no checkpoint yet)"
    return f"the same command {since}"
