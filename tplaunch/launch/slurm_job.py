"""Inside a Slurm job, on its first node: `python -m tplaunch.launch.slurm_job prepare|nodes|run ...`.

The batch script calls `nodes` to order the nodes and to get rid of bad ones, and then becomes `run`, which starts the
ranks, hands Slurm's signals on to them and, when they have ended, decides what becomes of the job (`judge`).
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

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.launch import slurm
from tplaunch.rundir import Record, RunDir

if TYPE_CHECKING:
    from tplaunch.check import Checked
    from tplaunch.launch.console import RunView

GIVE_UP = 3  # attempts in a row that end without a new checkpoint
GAVE_UP = f"{GIVE_UP} attempts in a row have ended without a new checkpoint: giving up"
POLL_S = 0.5
REPEAT_S = 3.0  # between signals to the ranks: those that had not started yet have missed the first


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job.

    Args:
        code: its exit code, where it ends.
        then: it ends; its ranks are started again, here; or it goes back to the queue.
        last: later jobs of its chain are not wanted.
        why: in words, for its log.
    """

    code: Exit
    then: Literal["end", "again", "requeue"]
    why: str
    last: bool = False


def judge(
    events: Sequence[Record],
    *,
    told: Literal["USR1", "TERM"] | None,
    state: str,
    preempted: bool,
    may_restart: bool,
    may_requeue: bool,
) -> Verdict:
    """Decides after the ranks have ended.

    Args:
        events: of the run, up to now.
        told: what signal the batch script has got: USR1 is Slurm's, before the time limit; TERM is the user's.
        state: of the job, as Slurm says.
        preempted: Slurm needs its nodes for another. A preempted job that ends by itself is not requeued by Slurm.
        may_restart: launch.max_restarts is not used up.
        may_requeue: the recipe's launch.slurm.requeue.
    """
    ending = how_attempt_ended(events)
    if ending == "done":
        return Verdict(Exit.DONE, "end", "the last step is done", last=True)
    code = Exit.STOPPED if ending == "stopped" else Exit.FAILED
    if state != "RUNNING":
        return Verdict(code, "end", f"Slurm ends this job itself ({state.lower()})")
    back: Literal["end", "requeue"] = "requeue" if may_requeue else "end"
    leaving = "preempted" if preempted else "the time limit is near" if told == "USR1" else ""
    if ending == "stopped":
        if leaving:
            return Verdict(code, back, f"stopped with a checkpoint: {leaving}")
        return Verdict(code, "end", "stopped with a checkpoint, as was asked", last=True)
    if told == "TERM":
        return Verdict(code, "end", "ended without a checkpoint when asked to stop", last=True)
    failures = count_failures(events)
    if failures >= GIVE_UP:
        return Verdict(code, "end", GAVE_UP, last=True)
    progress = (
        f"attempt {failures} of at most {GIVE_UP} without a new checkpoint" if failures else "it had made progress"
    )
    return Verdict(code, "again" if may_restart and not leaving else back, f"failed: {progress}")


def how_attempt_ended(events: Sequence[Record]) -> Literal["done", "stopped", "failed"]:
    """The end of the latest attempt, from what its ranks have noted."""
    for event in reversed(events):
        if event["event"] in ("done", "stopped"):
            return event["event"]
        if event["event"] == "attempt":
            break
    return "failed"


def count_failures(events: Sequence[Record]) -> int:
    """Attempts since the last progress: a new checkpoint, a stop on request, or a new submission."""
    failures, newest = 0, 0
    for event in events:
        match event["event"]:
            case "attempt" | "bad_nodes":
                failures += 1
            case "checkpoint" if event["step"] > newest:
                newest, failures = event["step"], 0
            case "stopped" | "done" | "submit":
                failures = 0
    return failures


def order_nodes(nodes: Sequence[str], addresses: Mapping[str, str]) -> list[str]:
    """The nodes with those on one switch side by side, else in the order that Slurm gives them.

    Args:
        addresses: of each node, its switches and itself, outermost first: "s0.s2.n3" (SLURM_TOPOLOGY_ADDR).
    """
    seen: dict[str, int] = {}
    keys = {}
    for node in nodes:
        switches = addresses[node].split(".")[:-1]
        paths = [".".join(switches[: depth + 1]) for depth in range(len(switches))]
        keys[node] = [seen.setdefault(path, len(seen)) for path in paths]
    return sorted(nodes, key=keys.__getitem__)


def nodes(run_dir: RunDir, reports: Sequence[str]) -> Exit:
    """Reads what the nodes say of themselves and prints their order, one a line; or sends the job away from bad ones.

    Args:
        reports: lines from `tplaunch.launch.node_check`, among others. A node that says nothing is taken as it is.
    """
    job_id = own_job_id()
    names = slurm.node_names(os.environ["SLURM_JOB_NODELIST"])
    found = [report for line in reports if line.startswith("{") for report in [json.loads(line)]]
    bad = {report["node"]: report["problems"] for report in found if report["problems"]}
    for node, problems in bad.items():
        say(f"node {node} is not fit: {'; '.join(problems)}")
    if not bad:
        addresses = {report["node"]: report["address"] for report in found}
        print("\n".join(order_nodes(names, addresses) if set(names) <= set(addresses) else names))
        return Exit.DONE
    run_dir.append_event("bad_nodes", job=job_id, nodes=sorted(bad), problems=bad)
    if len(names) > 1 and len(bad) == len(names):
        say("every node says so: the cause is not a node; giving up")
        return Exit.FAILED
    if count_failures(run_dir.read_events()) >= GIVE_UP:
        say(GAVE_UP)
        return Exit.FAILED
    if _may_requeue(run_dir):
        return Exit.STOPPED if _requeue(job_id, exclude=sorted(bad)) else Exit.FAILED
    for later in _rest_of_chain(run_dir, job_id):
        slurm.exclude_nodes(later, sorted(bad))
    say("launch.slurm.requeue is off: a later job of the chain, or a new one with launch.slurm.exclude, can go on")
    return Exit.FAILED


class Signals:
    """What Slurm or the user has told this script; a wish of the user outlives a warning of Slurm."""

    def __init__(self) -> None:
        self.told: Literal["USR1", "TERM"] | None = None
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.told = "TERM"
        elif self.told is None:
            self.told = "USR1"


def run(run_dir: RunDir, command: Sequence[str]) -> Exit:
    """Runs the ranks, once or, after failures, several times, and decides what comes next.

    Args:
        command: the srun line that starts the ranks.
    """
    from tplaunch.check import check_recipe
    from tplaunch.launch.prepare import steps_done
    from tplaunch.recipe.load import load_recipe

    signals = Signals()
    job_id = own_job_id()
    checked = check_recipe(load_recipe(run_dir.recipe), need_data=False)
    launch, restarts = checked.recipe.launch, 0
    with run_dir.lock():
        if steps_done(run_dir) >= checked.recipe.training.steps:
            say(f"step {steps_done(run_dir)} is done already")
            _cancel_rest(run_dir, job_id)
            return Exit.DONE
        while True:
            attempt = _attempt(checked, run_dir, command, signals)
            job, events = _own_job(job_id), run_dir.read_events()
            restarts = restarts if count_failures(events) else 0
            verdict = judge(
                events,
                told=signals.told,
                state=job.state if job else "RUNNING",
                preempted=job.preempted if job else False,
                may_restart=restarts < launch.max_restarts,
                may_requeue=launch.slurm.requeue,
            )
            say(verdict.why)
            run_dir.append_event("attempt_end", attempt=attempt, job=job_id, code=int(verdict.code), why=verdict.why)
            if verdict.then != "again":
                break
            restarts += 1
            say(f"once more, {restarts} of at most {launch.max_restarts} times without a new checkpoint")
        if verdict.last:
            _cancel_rest(run_dir, job_id)
    # Outside the lock: the next attempt must not find it taken.
    if verdict.then == "requeue":
        _requeue(job_id)
    return verdict.code


def _attempt(checked: Checked, run_dir: RunDir, command: Sequence[str], signals: Signals) -> int:
    """Starts the ranks, waits for their end, shows why if they have failed, and returns the attempt's number."""
    from rich.console import Console

    from tplaunch.launch import failure
    from tplaunch.launch.console import RunView

    attempt, job_id = run_dir.next_attempt(), own_job_id()
    nodes = Path(os.environ["SLURM_HOSTFILE"]).read_text().split()
    run_dir.append_event("attempt", attempt=attempt, job=job_id, nodes=nodes)
    say(f"attempt {attempt}, job {job_id}, nodes {' '.join(nodes)}")
    console = Console(highlight=False, markup=False, emoji=False, force_terminal=False)
    environment = {**os.environ, "TPLAUNCH_ATTEMPT": str(attempt)}
    with run_dir.torchrun_log(attempt).open("wb") as log:
        srun = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _attend(srun, signals, RunView(checked, run_dir, console))
    if how_attempt_ended(run_dir.read_events()) == "failed":
        failure.print_cause(console, failure.find_cause(run_dir, attempt), checked.topology, "")
    return attempt


def _attend(srun: subprocess.Popen[bytes], signals: Signals, view: RunView) -> None:
    """Shows how the run goes, and hands on what the job is told, until srun ends."""
    repeat_at = 0.0
    while srun.poll() is None:
        if signals.told and time.monotonic() >= repeat_at:
            if repeat_at == 0.0:
                say(f"told to stop ({signals.told}): the ranks finish their step and save")
            srun.send_signal(signal.SIGUSR1)  # srun hands it to every rank
            repeat_at = time.monotonic() + REPEAT_S
        view.update()
        time.sleep(POLL_S)
    view.close()


def prepare(argv: Sequence[str]) -> Exit:
    """Makes a run ready within its job, and prints what the script needs to know of it, for `eval`.

    Args:
        argv: RECIPE [--set KEY=VALUE]... [--run-dir DIR]
    """
    from tplaunch.launch.slurm_submit import plan_submission, prepare_run

    parser = argparse.ArgumentParser(prog="train.sbatch", allow_abbrev=False)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args(argv)
    submission = plan_submission(options.recipe, options.set, run_dir=options.run_dir)
    (member,) = submission.members
    topology, allocated = member.checked.topology, int(os.environ["SLURM_NNODES"])
    if topology.nodes != allocated:
        what = f"the recipe asks for {topology.nodes} nodes, the job has {allocated}"
        raise TplaunchError(Problem(what, fix=f"sbatch --nodes={topology.nodes}, or --set topology.nodes={allocated}"))
    prepare_run(member)
    run_dir, job_id = member.run_dir, own_job_id()
    if job_id not in submitted_jobs(run_dir.read_events()):  # not a later attempt of the same job
        job = slurm.find_job(job_id)
        run_dir.append_event("submit", jobs=[job_id], logs=[str(job.log) if job else ""])
    values = {"RUN_DIR": run_dir.root, "WORKERS": topology.ranks_per_node}
    print("\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in values.items()))
    return Exit.DONE


def _own_job(job_id: str) -> slurm.Job | None:
    """What Slurm knows of this job; None where its controller is away just now."""
    try:
        return slurm.find_job(job_id)
    except TplaunchError as error:
        say(str(error))
        return None


def _may_requeue(run_dir: RunDir) -> bool:
    from tplaunch.recipe.load import load_recipe

    return load_recipe(run_dir.recipe).recipe.launch.slurm.requeue


def _requeue(job_id: str, *, exclude: Sequence[str] = ()) -> bool:
    """Sends this job back to the queue, and says whether Slurm lets it. Slurm then ends this process."""
    # Slurm's TERM comes at once, to the commands started here too; they inherit that it is ignored.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        slurm.requeue(job_id)
        if exclude:
            slurm.exclude_nodes(job_id, exclude)
    except TplaunchError as error:
        say(f"{error}\n  fix: submit again; on clusters without requeue: tplaunch submit --chain N")
        return False
    say("back to the queue" + (f" without {', '.join(exclude)}" if exclude else ""))
    return True


def _cancel_rest(run_dir: RunDir, job_id: str) -> None:
    try:
        slurm.cancel(_rest_of_chain(run_dir, job_id))
    except TplaunchError as error:  # they will see for themselves that the run is done
        say(str(error))


def _rest_of_chain(run_dir: RunDir, job_id: str) -> list[str]:
    """The jobs of this run's chain that come after this one."""
    jobs = submitted_jobs(run_dir.read_events())
    return jobs[jobs.index(job_id) + 1 :] if job_id in jobs else []


def submitted_jobs(events: Sequence[Record]) -> list[str]:
    """The jobs of the latest submission of a run, in the order of their chain."""
    return next((event["jobs"] for event in reversed(events) if event["event"] == "submit"), [])


def own_job_id(environ: Mapping[str, str] = os.environ) -> str:
    """This job's number in the form that Slurm's commands accept; a task of an array is "array_task"."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


def say(text: str) -> None:
    """One line in the job's log. Standard error: standard output of `nodes` is its result."""
    print(f"tplaunch: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> Exit:
    verb, *rest = argv
    try:
        if verb == "prepare":
            return prepare(rest)
        run_dir, *command = rest
        if verb == "nodes":
            return nodes(RunDir(Path(run_dir)), sys.stdin.read().splitlines())
        return run(RunDir(Path(run_dir)), command)
    except TplaunchError as error:
        say(str(error))
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
