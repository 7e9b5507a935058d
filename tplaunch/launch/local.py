"""Runs a recipe on this machine: starts torchrun, shows progress, shuts it down cleanly and restarts it on failure.

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

from rich.console import Console

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.store import goes_on_after
from tplaunch.errors import Exit
from tplaunch.launch import failure
from tplaunch.launch.console import RunView, print_summary
from tplaunch.launch.supervise import Verdict, judge, supervise
from tplaunch.launch.torchrun import WORKER, torchrun_argv, torchrun_environment
from tplaunch.run.directory import LOCKED, RunDir
from tplaunch.run.heartbeat import trains
from tplaunch.run.history import History
from tplaunch.run.processes import (
    LAUNCH_ID,
    die_with_parent,
    end_launch,
    ignore_profile_signal,
    kill,
    processes_of,
    ranks_of,
)

POLL_S = 0.1
PEERS_S = 4.0  # that workers have to end after one has failed, and torchrun after they have
TORCHRUN_S = 10.0  # that torchrun has to end after its workers' grace is over
LEFTOVERS_S = 5.0  # that helpers of workers, such as W&B's, have to end after torchrun has
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # USR1: Slurm's usual warning


def _prepare_torchrun(launcher: int) -> None:
    """In the process that becomes torchrun."""
    ignore_profile_signal()  # which the launcher handles: its child would be ended by it
    die_with_parent(launcher)


class StopSignals:
    """What the user, or a batch system, has asked of this launch by signals.

    Only a second Ctrl-C asks for an end at once: Slurm and others repeat SIGTERM before they send SIGKILL.
    """

    def __init__(self) -> None:
        self.soon = self.now = False
        self.profile = False  # asked for, by SIGUSR2

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.now = self.now or (self.soon and number == signal.SIGINT)
        self.soon = True

    def _note_profile(self, number: int, frame: FrameType | None) -> None:
        self.profile = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block. Main thread only."""
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._note_profile)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class PeerWatch:
    """Kills the workers that do not end after another has failed, and torchrun if it then stays.

    Args:
        torchrun: its process id.
    """

    def __init__(self, run_dir: RunDir, attempt: int, launch_id: str, torchrun: int) -> None:
        self.run_dir, self.attempt, self.launch_id, self.torchrun = run_dir, attempt, launch_id, torchrun
        self.deadline: float | None = None

    def look(self, *, stopping: bool) -> None:
        """Look for a failure, and act on one that is old enough.

        Args:
            stopping: all workers have been told to end, so that this is no sign of a failure.
        """
        now = time.monotonic()
        if self.deadline is None and self._failed(stopping):
            self.deadline = now + PEERS_S
        if self.deadline is not None and now > self.deadline:
            kill(processes_of(self.launch_id) - {self.torchrun} or {self.torchrun})
            self.deadline = now + PEERS_S

    def _failed(self, stopping: bool) -> bool:
        if any(self.run_dir.attempt_dir(self.attempt).glob("*.error.json")):
            return True
        log = self.run_dir.torchrun_log(self.attempt)
        return not stopping and bool(failure.workers_told_to_end(log.read_text(errors="replace")))


class LocalLaunch:
    """One `tplaunch train`.

    Args:
        checked: the recipe, which lies resolved in `run_dir.recipe`; from the first attempt on as it is in force then.
        run_dir: the run directory, which the caller holds (`RunDir.lock`).
        resume: auto, none, or a checkpoint's path; restarts after a new checkpoint go on from that.
        module: what each rank runs.
    """

    def __init__(self, checked: Checked, run_dir: RunDir, *, resume: str = "auto", module: str = WORKER) -> None:
        self.checked, self.run_dir, self.resume, self.module = checked, run_dir, resume, module
        self.console, self.errors = (
            Console(stderr=e, highlight=False, markup=False, emoji=False) for e in (False, True)
        )
        self.stop = StopSignals()
        self.exit_code = 0  # of the latest torchrun; one that was told to stop exits 1 even if all went well
        self.events_before = len(run_dir.history().events)

    def run(self) -> Exit:
        """Train until the run is done, fails or is stopped; then no process of it is left.

        A failed run is started again, as a new attempt, up to `launch.max_restarts` times without a new checkpoint.

        SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop it in good order: the workers finish their step and save, for which
        they have the recipe's `launch.slurm.grace`. A second Ctrl-C ends it at once. SIGUSR2 asks the ranks of
        `logging.profile` for a profile.

        Returns:
            DONE, STOPPED (a complete checkpoint is there) or FAILED (the cause has been shown).
        """
        began, recipe = time.monotonic(), self.checked.recipe
        with self.stop.listening():
            verdict = supervise(
                self.run_dir,
                self._attempt,
                self._decide,
                self._again,
                max_restarts=recipe.launch.max_restarts,
                on_event=recipe.logging.on_event if self.module == WORKER else None,
            )
        if verdict.code is not Exit.FAILED:
            if verdict.code is Exit.STOPPED:
                self.console.print(f"stopped; {self._next_launch()}", soft_wrap=True)
            print_summary(self.console, self.run_dir, time.monotonic() - began)
        elif self.stop.now or (self.stop.soon and not failure.errors(self.run_dir, self.run_dir.last_attempt())):
            self.errors.print(f"ended before it could save; {self._next_launch()}", soft_wrap=True)
        else:
            self._print_cause(self.run_dir.last_attempt(), self._next_launch())
        return verdict.code

    def _attempt(self, attempt: int) -> None:
        """Run torchrun once, until no process of it is left."""
        run_dir = self.run_dir
        saved = History(run_dir.history().events[self.events_before :]).newest_checkpoint is not None
        resume = "auto" if saved else self.resume
        checked = self.checked = self.checked.at(goes_on_after(run_dir, resume))
        ranks, grace_s, launch_id = checked.topology.world_size, checked.recipe.launch.slurm.grace, uuid.uuid4().hex
        environment = {
            **os.environ,
            **torchrun_environment(ranks, attempt=attempt, resume=resume, grace_s=grace_s, one_node=True),
            "LOGLEVEL": "WARNING",  # torchrun's; its warnings say which workers it ends
            LAUNCH_ID: launch_id,
            LOCKED: "1",
        }
        with run_dir.torchrun_log(attempt).open("wb") as log:
            view = RunView(checked, run_dir, self.console)
            process = subprocess.Popen(
                torchrun_argv(run_dir.root, ranks, module=self.module),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher only
                preexec_fn=partial(_prepare_torchrun, os.getpid()),
            )
            try:
                self._attend(process, view, PeerWatch(run_dir, attempt, launch_id, process.pid), grace_s)
            finally:
                process.kill()
                stuck = end_launch(launch_id, patience_s=0 if self.stop.now else LEFTOVERS_S)
                view.close()
        if stuck:
            self.console.print(
                f"processes {sorted(stuck)} do not end even by SIGKILL: the kernel or a device holds them"
            )
        self.exit_code = process.wait()

    def _attend(self, process: subprocess.Popen[bytes], view: RunView, peers: PeerWatch, grace_s: float) -> None:
        """Show progress until torchrun has ended, or must be ended now."""
        stop_by: float | None = None
        while process.poll() is None and not self.stop.now:
            view.update()
            peers.look(stopping=stop_by is not None)
            if self.stop.profile:
                self.stop.profile = False
                view.say(self._ask_for_profile(peers))
            if stop_by is None and self.stop.soon:
                view.say(f"stopping after this step and a checkpoint, at most {grace_s:.0f} s; Ctrl-C ends it now")
                process.terminate()
                stop_by = time.monotonic() + grace_s + TORCHRUN_S
            if stop_by is not None and time.monotonic() > stop_by:
                return
            time.sleep(POLL_S)

    def _ask_for_profile(self, launch: PeerWatch) -> str:
        """Hand SIGUSR2 on to the ranks that the recipe lists, once they train; returns what to say of it."""
        if not trains(self.run_dir.attempt_dir(launch.attempt)):
            return "no profile yet: the ranks are still starting; SIGUSR2 asks again"
        listed = self.checked.recipe.logging.profile.ranks
        pids = ranks_of(launch.launch_id, launch.torchrun)
        kill((pids[rank] for rank in listed if rank in pids), signal.SIGUSR2)
        return f"asked rank {', '.join(map(str, listed))} for a profile"

    def _decide(self, history: History, may_restart: bool) -> Verdict:
        if self.stop.soon and history.ending == "failed" and not history.trained:
            return Verdict(Exit.STOPPED, "end", "stopped before training began: nothing is lost")
        crashed = self.exit_code != 0 and not self.stop.soon
        return judge(history, crashed=crashed, asked_to_stop=self.stop.soon, may_restart=may_restart)

    def _again(self, verdict: Verdict, attempt: int, restarts: int) -> None:
        limit = self.checked.recipe.launch.max_restarts
        self._print_cause(attempt, f"restart {restarts} of at most {limit} without a new checkpoint")

    def _print_cause(self, attempt: int, next_step: str) -> None:
        failure.print_cause(self.errors, failure.find_cause(self.run_dir, attempt), self.checked.recipe, next_step)

    def _next_launch(self) -> str:
        history = self.run_dir.history()
        saved = history.newest_checkpoint
        if saved is None and (parent := history.parent) is not None:
            return f"the same command starts again after step {parent.step} of {parent.parent}"
        if saved is None:
            return "the same command starts from the beginning (there is no checkpoint yet)"
        return f"the same command goes on after step {saved}"
