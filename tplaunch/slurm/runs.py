"""Runs that were submitted to Slurm: where they are, how they stand, what they print."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.files import Tail, parse_lines
from tplaunch.run.directory import RunDir, runs_under
from tplaunch.run.events import AttemptBegan, AttemptEnded, BadNodes, Submitted
from tplaunch.run.history import History
from tplaunch.slurm import client

FRESH_S = 120.0  # a sign of life that is younger is one
POLL_S = 2.0  # between questions to the controller, which many users share


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. What is not known is None.

    Args:
        run: the run directory.
        job: the job that runs, waits or was last.
        state: new (never submitted nor started), pending, running, requeued (waits again), stopping, done, stopped,
            failed, gone (Slurm has forgotten the job, and the run did not say how it ended), or Slurm's own word.
        attempt: how often the ranks were started.
        seconds_left: at the present speed.
        why: why it waits, or how it ended.
    """

    run: Path
    job: str
    state: str
    nodes: str
    attempt: int
    step: int | None
    steps: int
    loss: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    why: str


def find_runs(targets: Sequence[str], folder: Path = Path("runs")) -> list[RunDir]:
    """The runs that are meant.

    Args:
        targets: run directories, sweeps (folders of run directories), names under `folder`, or job numbers;
            none: every run under `folder` that was submitted to Slurm.

    Raises:
        TplaunchError: a target is none of these.
    """
    if not targets:
        return [run for run in runs_under(folder) if run.history().submitted_jobs]
    found: list[RunDir] = []
    problems = []
    for target in targets:
        runs = [run for path in (Path(target), folder / target) for run in runs_under(path)]
        if not runs and target.replace("_", "").isdecimal():
            runs = [run for run in runs_under(folder) if _holds(run.history().submitted_jobs, target)]
        if not runs:
            fix = f"see tplaunch status, or ls {shlex.quote(str(folder))}"
            problems.append(Problem(f"{target!r} is no run directory, name or job number", fix=fix))
        found += runs
    if problems:
        raise TplaunchError(*problems)
    return list(dict.fromkeys(RunDir(run.root.absolute()) for run in found))


def _holds(jobs: Sequence[str], target: str) -> bool:
    return any(target in (job, job.split("_")[0]) for job in jobs)


def statuses_of(runs: Sequence[RunDir]) -> list[RunStatus]:
    """How runs stand, from Slurm where it still knows their jobs, which is asked once, and from their directories."""
    histories = [run.history() for run in runs]
    jobs = client.find_jobs([job for history in histories for job in history.submitted_jobs])
    return [_status(run, history, jobs) for run, history in zip(runs, histories, strict=True)]


def status_of(run_dir: RunDir) -> RunStatus:
    """How a run stands."""
    return statuses_of([run_dir])[0]


@dataclass(frozen=True)
class Stand:
    """How a run stands, by its jobs and its events; see `RunStatus`."""

    job: str
    state: str
    nodes: str
    attempt: int
    why: str


def stand_of(run_dir: RunDir, history: History, jobs: Mapping[str, client.Standing]) -> Stand:
    """How a run stands.

    Args:
        jobs: what Slurm knows, by number.
    """
    job_id, job = _job_that_counts(history, jobs)
    state, why = _standing(run_dir, history, job)
    return Stand(job_id, state, job.nodes if job else "", history.attempts, why)


def _status(run_dir: RunDir, history: History, jobs: Mapping[str, client.Standing]) -> RunStatus:
    from tplaunch.recipe.load import load_recipe  # pydantic: `tplaunch runs` does without

    metrics = run_dir.read_metrics()
    stand = stand_of(run_dir, history, jobs)
    steps = load_recipe(run_dir.recipe).recipe.training.steps
    last = metrics[-1] if metrics else {}
    step, step_time = last.get("step"), last.get("step_time_s")
    left = None if stand.state != "running" or step is None or step_time is None else (steps - step) * step_time
    return RunStatus(
        run=run_dir.root,
        job=stand.job,
        state=stand.state,
        nodes=stand.nodes,
        attempt=stand.attempt,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        seconds_left=left,
        why=stand.why,
    )


def current_job(history: History) -> tuple[str, client.Standing | None]:
    """The first job of the run's chain that is not over, else its last; its number, and what Slurm knows of it."""
    return _job_that_counts(history, client.find_jobs(history.submitted_jobs))


def _job_that_counts(history: History, jobs: Mapping[str, client.Standing]) -> tuple[str, client.Standing | None]:
    known: list[tuple[str, client.Standing | None]] = [("", None)]
    for job_id in history.submitted_jobs:
        known.append((job_id, jobs.get(job_id)))
        if (job := known[-1][1]) is not None and job.open:
            break
    # Jobs of a chain that were cancelled because the run was done before are not what the user asks for.
    started = [(job_id, job) for job_id, job in known if job is not None and (job.open or job.nodes)]
    return started[-1] if started else known[-1]


def _standing(run_dir: RunDir, history: History, job: client.Standing | None) -> tuple[str, str]:
    """The state of a run, and why."""
    if job is not None and job.open:
        if job.state == "PENDING":
            return "requeued" if job.restarts else "pending", client.explain_reason(job.reason)
        return "stopping" if job.state == "COMPLETING" else job.state.lower(), ""
    match history.end:
        case AttemptEnded(code=code, why=why):
            return "done" if code == Exit.DONE else "stopped" if code == Exit.STOPPED else "failed", why
        case BadNodes(nodes=nodes):
            return "failed", f"bad nodes: {', '.join(nodes)}"
    latest = next((e for e in reversed(history.events) if isinstance(e, (AttemptBegan, Submitted))), None)
    if isinstance(latest, Submitted) or (latest is not None and latest.job):
        if job is not None:
            return job.state.lower(), client.explain_reason(job.reason)
        known, forgotten = _last_words(history), "Slurm does not know the job any more"
        return ("gone" if known[0] == "failed" else known[0]), f"{forgotten}; {known[1]}"
    if latest is None:
        return "new", "never submitted, and never started on this machine"
    if run_dir.is_held() or _beats_elsewhere(run_dir):
        return "running", ""
    return _last_words(history)


def _beats_elsewhere(run_dir: RunDir) -> bool:
    """Whether the ranks of a launch on another machine, whose lock cannot be asked for here, gave a sign of life."""
    try:
        holder = next(iter(parse_lines(run_dir.lock_file.read_bytes())), {})
    except OSError:
        return False
    beat = run_dir.last_beat()
    return holder.get("host", "") != os.uname().nodename and beat is not None and time.time() - beat < FRESH_S


def _last_words(history: History) -> tuple[str, str]:
    """How the latest attempt stands by what its ranks noted, where no launcher has judged it, and that in words."""
    if isinstance(history.events[-1], Submitted) or not history.attempts:
        return "failed", "it has not started the ranks"
    if history.ending == "done":
        return "done", "the last step is done"
    saved = history.newest_checkpoint
    rest = "without a checkpoint" if saved is None else f"the newest checkpoint is of step {saved}"
    if history.ending == "stopped":
        return "stopped", f"stopped; {rest}"
    return "failed", f"its attempt {history.attempts} ended without a word, {rest}"


def wait_for(
    runs: Sequence[RunDir],
    while_waiting: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Exit:
    """Wait until no job of the runs waits or runs, and say how they ended: the worst of them.

    A controller that does not answer for a while, as it restarts or is busy, ends no wait.

    Args:
        while_waiting: called after each answer of the controller; it may ask, too.
        warn: told once when the controller ceases to answer.

    Raises:
        TplaunchError: Slurm cannot be asked at all, at the first question; or `while_waiting` cannot go on from it.
    """
    jobs, reached = _jobs_of(runs), True
    while_waiting()
    while not reached or any(job.open for job in jobs.values()):
        time.sleep(POLL_S)
        try:
            jobs = _jobs_of(runs)
            while_waiting()
        except TplaunchError as error:
            if reached:
                warn(f"{error}\nstill waiting")
            reached = False
        else:
            reached = True
    states = {stand_of(run, run.history(), jobs).state for run in runs}
    return Exit.DONE if states <= {"done"} else Exit.STOPPED if states <= {"done", "stopped"} else Exit.FAILED


def _jobs_of(runs: Sequence[RunDir]) -> dict[str, client.Standing]:
    """How the jobs of all the runs stand, by one question."""
    return client.find_jobs([job for run in runs for job in run.history().submitted_jobs])


def job_log(run_dir: RunDir) -> Path:
    """The log of the job that `status` speaks of.

    Raises:
        TplaunchError: the run was not submitted to Slurm.
    """
    history = run_dir.history()
    log = history.log_of(current_job(history)[0])
    if log is None:
        fix = "for what its ranks printed: tplaunch logs RUN --rank N"
        raise TplaunchError(Problem(f"{run_dir.root} was not submitted to Slurm", fix=fix))
    return log


def rank_log(run_dir: RunDir, rank: int) -> Path:
    """The log of a rank in the latest attempt that has one.

    Raises:
        TplaunchError: there is none.
    """
    logs = sorted(run_dir.logs.glob(f"attempt-*/rank-{rank}.log"), key=lambda path: int(path.parent.name[8:]))
    if not logs:
        raise TplaunchError(Problem(f"rank {rank} of {run_dir.root} has printed nothing yet"))
    return logs[-1]


class Follower:
    """Reads what is added to a log, and goes over to the next when the run has a new one.

    Args:
        newest: the log to read now; asked each time.
    """

    def __init__(self, newest: Callable[[], Path]) -> None:
        self.newest = newest
        self._tail: Tail | None = None

    def read(self) -> Iterator[str]:
        """What is new, in pieces of text."""
        path = self.newest()
        if self._tail is None or path != self._tail.path:
            if self._tail is not None:
                yield self._tail.read().decode(errors="replace")
            self._tail = Tail(path)
        yield self._tail.read().decode(errors="replace")


def cancel_run(run_dir: RunDir, *, now: bool) -> list[str]:
    """Stop a run: jobs that wait are taken from the queue, the one that runs is asked to save and stop.

    Args:
        now: do not ask, end it; what was trained since its last checkpoint is lost if it cannot save in Slurm's
            KillWait (30 s unless configured otherwise).

    Returns:
        What was done, a sentence for each job.
    """
    live = [job for job in client.find_jobs(run_dir.history().submitted_jobs).values() if job.open]
    # The waiting ones first: one that waits for the running one must not start when that ends.
    waiting = [job.id for job in live if job.state == "PENDING"]
    running = [job.id for job in live if job.state != "PENDING"]
    client.cancel([*waiting, *running] if now else waiting)
    done = [f"job {job_id}: taken from the queue" for job_id in waiting]
    for job_id in running:
        if now:
            done.append(f"job {job_id}: ended")
        else:
            client.ask_to_stop(job_id)
            done.append(f"job {job_id}: asked to finish its step, save and stop")
    return done
