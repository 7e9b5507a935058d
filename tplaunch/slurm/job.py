"""Inside a Slurm job, on its first node: `python -m tplaunch.slurm.job prepare|nodes|run ...`.

The batch script calls `nodes` to order the nodes and to get rid of bad ones, and then becomes `run`, which starts the
ranks, hands Slurm's signals on to them and, when they have ended, decides what becomes of the job.
(`prepare` is for scripts that `tplaunch submit` did not write: it does what that does beforehand.)

=========================================  =========================================================
the last step is done                      exit 0; later jobs of a chain are cancelled
stopped, told so before the time limit     back to the queue (or the next job of the chain), exit 75
  (USR1) or because of preemption
stopped, because the user wished it        exit 75; later jobs of a chain are cancelled
failed                                     once more in the same nodes, launch.max_restarts times without a new
                                             checkpoint; then back to the queue (or the next job of the
                                             chain), exit 1
failed, for the third time in a row        exit 1; later jobs of a chain are cancelled
  without a new checkpoint
ended by Slurm (scancel, a lost node)      nothing: Slurm has decided already
=========================================  =========================================================
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.console import Console

from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.checkpoint.store import goes_on_after
from tplaunch.errors import Exit, TplaunchError
from tplaunch.launch import failure
from tplaunch.launch.console import RunView
from tplaunch.launch.supervise import Verdict, judge, supervise
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import LOCKED, RunDir
from tplaunch.run.heartbeat import trains
from tplaunch.run.history import History
from tplaunch.run.processes import ignore_profile_signal
from tplaunch.slurm.nodes import check_nodes
from tplaunch.slurm.own_job import GIVE_UP, cancel_rest, own_job, own_job_id, requeue, say
from tplaunch.slurm.prepare import prepare
from tplaunch.streams import adapt_encoding

POLL_S = 0.5
REPEAT_S = 3.0  # between signals to the ranks: those that had not started yet have missed the first


class StopSignals:
    """The last stop signal received, and whether a profile is asked for. A user's SIGTERM overrides Slurm's USR1
    warning."""

    def __init__(self) -> None:
        self.told: Literal["USR1", "TERM"] | None = None
        self.profile = False  # asked for, by USR2
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGUSR2, self._note_profile)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.told = "TERM"
        elif self.told is None:
            self.told = "USR1"

    def _note_profile(self, number: int, frame: FrameType | None) -> None:
        self.profile = True


class JobLaunch:
    """The launch of a run inside its job.

    Args:
        checked: the recipe, which lies resolved in `run_dir.recipe`.
        run_dir: the run directory, which the caller holds (`RunDir.lock`).
        command: the srun line that starts the ranks.
        signals: what this script is told.
    """

    def __init__(self, checked: Checked, run_dir: RunDir, command: Sequence[str], signals: StopSignals) -> None:
        self.checked, self.run_dir, self.command, self.signals = checked, run_dir, command, signals
        self.launch = checked.recipe.launch
        self.job_id = own_job_id()
        self.nodes = Path(os.environ["SLURM_HOSTFILE"]).read_text().split()
        self.console = Console(highlight=False, markup=False, emoji=False, force_terminal=False)

    def run(self) -> Verdict:
        """Run the ranks, once or, after failures, several times, and decide what comes next."""
        verdict = supervise(
            self.run_dir,
            self._attempt,
            self._decide,
            self._again,
            max_restarts=self.launch.max_restarts,
            job=self.job_id,
            nodes=self.nodes,
            on_event=self.checked.recipe.logging.on_event,
        )
        say(verdict.why)
        return verdict

    def _attempt(self, attempt: int) -> None:
        """Start the ranks, wait for their end, and show why if they have failed."""
        run_dir = self.run_dir
        self.checked = self.checked.at(goes_on_after(run_dir, "auto"))
        say(f"attempt {attempt}, job {self.job_id}, nodes {' '.join(self.nodes)}")
        environment = {**os.environ, "TPLAUNCH_ATTEMPT": str(attempt), LOCKED: "1"}
        with run_dir.torchrun_log(attempt).open("wb") as log:
            srun = subprocess.Popen(self.command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            self._attend(srun, RunView(self.checked, run_dir, self.console), run_dir.attempt_dir(attempt))
        if run_dir.history().ending == "failed":
            failure.print_cause(self.console, failure.find_cause(run_dir, attempt), self.checked.recipe, "")

    def _attend(self, srun: subprocess.Popen[bytes], view: RunView, attempt_dir: Path) -> None:
        """Show progress, and hand on what the job is told, until srun ends."""
        repeat_at = 0.0
        while srun.poll() is None:
            if self.signals.told and time.monotonic() >= repeat_at:
                if repeat_at == 0.0:
                    say(f"told to stop ({self.signals.told}): the ranks finish their step and save")
                srun.send_signal(signal.SIGUSR1)  # srun hands it to every rank
                repeat_at = time.monotonic() + REPEAT_S
            if self.signals.profile and trains(attempt_dir):  # srun itself may be ended by it at its start
                self.signals.profile = False
                say("asked for a profile (USR2)")
                srun.send_signal(signal.SIGUSR2)  # as above; those that logging.profile does not list ignore it
            view.update()
            time.sleep(POLL_S)
        view.close()

    def _decide(self, history: History, may_restart: bool) -> Verdict:
        job = own_job(self.job_id)
        return judge_job(
            history,
            told=self.signals.told,
            state=job.state if job else "RUNNING",
            preempted=job.preempted if job else False,
            may_restart=may_restart,
            may_requeue=self.launch.slurm.requeue,
        )

    def _again(self, verdict: Verdict, attempt: int, restarts: int) -> None:
        say(verdict.why)
        say(f"once more, {restarts} of at most {self.launch.max_restarts} times without a new checkpoint")


def judge_job(
    history: History,
    *,
    told: Literal["USR1", "TERM"] | None,
    state: str,
    preempted: bool,
    may_restart: bool,
    may_requeue: bool,
) -> Verdict:
    """Decide what becomes of a job after its ranks have ended.

    Args:
        told: what signal the batch script has got: USR1 is Slurm's, before the time limit; TERM is the user's.
        state: of the job, as Slurm says.
        preempted: Slurm needs its nodes for another. A preempted job that ends by itself is not requeued by Slurm.
        may_restart: launch.max_restarts is not used up.
        may_requeue: the recipe's launch.slurm.requeue.
    """
    return judge(
        history,
        asked_to_stop=told == "TERM",
        leaving="preempted" if preempted else "the time limit is near" if told == "USR1" else "",
        ended_by="" if state == "RUNNING" else state.lower(),
        may_restart=may_restart,
        may_requeue=may_requeue,
        give_up_after=GIVE_UP,
    )


def run(run_dir: RunDir, command: Sequence[str]) -> Exit:
    """Run a run's ranks until the job's end is decided, and do to the job what was decided.

    Args:
        command: the srun line that starts the ranks.
    """
    signals = StopSignals()
    job_id = own_job_id()
    checked = check_recipe(load_recipe(run_dir.recipe), need_data=False)
    with run_dir.lock():
        done = run_dir.history().steps_done
        if done >= checked.recipe.training.steps:
            say(f"step {done} is done already")
            cancel_rest(run_dir, job_id)
            return Exit.DONE
        verdict = JobLaunch(checked, run_dir, command, signals).run()
        if verdict.last:
            cancel_rest(run_dir, job_id)
    # Outside the lock: the next attempt must not find it taken.
    if verdict.then == "requeue":
        requeue(job_id)
    return verdict.code


def main(argv: Sequence[str]) -> Exit:
    """Run one verb."""
    ignore_profile_signal()  # until the ranks run
    verb, *rest = argv
    try:
        if verb == "prepare":
            return prepare(rest)
        run_dir, *command = rest
        if verb == "nodes":
            return check_nodes(RunDir(Path(run_dir)), sys.stdin.read().splitlines())
        return run(RunDir(Path(run_dir)), command)
    except TplaunchError as error:
        say(str(error))
        return error.code


if __name__ == "__main__":
    adapt_encoding()
    sys.exit(main(sys.argv[1:]))
