"""Slurm's own commands, called and read. Text output only: it is alike from Slurm 22.05 on, its JSON is not.

Nothing here needs accounting (`sacct`): `scontrol show job` knows jobs for `MinJobAge` after their end.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tplaunch.errors import Exit, Problem, TplaunchError

TIMEOUT = 60.0  # seconds that a Slurm command may take; a busy controller takes several

_NOTHING = ("(null)", "None", "Unknown", "N/A")  # what Slurm says where there is nothing to say

# States of a job whose fate is open; every other state is final.
OPEN_STATES = frozenset({"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "STOPPED"})


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a job stands.

    Args:
        id: "12", or "12_3" for a task of an array: the form that commands accept.
        state: RUNNING, PENDING, COMPLETED, FAILED, CANCELLED, ... as `scontrol show job` says it.
        reason: why it waits or ended, "" for none.
        nodes: the list in Slurm's short form, such as n[1-4]; "" before it starts.
        restarts: how often it was requeued.
    """

    id: str
    state: str
    reason: str
    nodes: str
    restarts: int

    @property
    def open(self) -> bool:
        return self.state in OPEN_STATES


@dataclass(frozen=True, kw_only=True)
class Job(Standing):
    """What Slurm knows of a job.

    Args:
        excluded: nodes it must not run on, in Slurm's short form.
        exit_code: of the batch script.
        start: when it started or, while it waits, when Slurm expects it to; None: not known.
        preempted: a job of higher priority is taking its place.
        log: the file that its script writes to.
    """

    excluded: str
    exit_code: int
    start: datetime | None
    preempted: bool
    log: Path | None


def call(*argv: str) -> str:
    """Standard output of a Slurm command.

    Raises:
        TplaunchError: it is not installed, failed, or took too long; the message is Slurm's own.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except FileNotFoundError:
        raise TplaunchError(
            Problem(
                f"{argv[0]} is not installed here",
                why="this machine is no login node of a Slurm cluster",
                fix="run it on a login node; to train on this machine: tplaunch train",
            )
        ) from None
    except subprocess.TimeoutExpired:
        what = f"{argv[0]} did not answer within {TIMEOUT:.0f} s"
        raise TplaunchError(Problem(what, fix="see whether the controller is up: scontrol ping")) from None
    if done.returncode != 0:
        raise TplaunchError(Problem(f"{' '.join(argv[:2])} failed", why=done.stderr.strip()), code=Exit.FAILED)
    return done.stdout


def version() -> str:
    """Such as "22.05.8".

    Raises:
        TplaunchError: Slurm is not installed here.
    """
    return call("sbatch", "--version").split()[-1]


def submit(script: Path, *, after: str | None = None) -> str:
    """Submit a batch script and return the job's number.

    Args:
        after: a job whose end, good or bad, this one waits for.

    Raises:
        TplaunchError: sbatch refuses it; says which key of the recipe that is about, where that is known.
    """
    dependency = [f"--dependency=afterany:{after}"] if after else []
    try:
        # --parsable prints "number" or "number;cluster".
        return call("sbatch", "--parsable", *dependency, str(script)).strip().split(";")[0]
    except TplaunchError as error:
        raise TplaunchError(*map(_explain_refusal, error.problems), code=error.code) from None


_SEE_NODES = "see what the nodes have: sinfo --Node --format='%R %N %c %m %G %b'"
# What sbatch says when it refuses a job; the keys of launch.slurm that it is about, and how to find what would do.
_REFUSALS = [
    (r"partition (name )?(specified|is invalid)|[Ii]nvalid partition", "partition", "see the partitions: sinfo"),
    (r"Invalid account", "account", "see yours: sacctmgr show associations user=$USER format=account,partition,qos"),
    (r"Invalid qos|QOS", "qos", "see yours: sacctmgr show associations user=$USER format=account,partition,qos"),
    (r"[Tt]ime limit", "time", "see the partitions' limits: sinfo --format='%R %l'"),
    (r"reservation", "reservation", "see them: scontrol show reservation"),
    (r"feature", "constraint", "see the features: sinfo --format='%R %b'"),
    (r"license", "licenses", "see them: scontrol show licenses"),
    (r"node name", "nodelist or launch.slurm.exclude", "see the nodes: sinfo --Node"),
    (r"dependency", "dependency", "see the jobs: squeue --me"),
    (r"--mail-type", "mail_type", "such as END,FAIL"),
    (r"generic resource|gres", "gpus or launch.slurm.gpu_type", _SEE_NODES),
    (r"[Mm]emory", "mem", _SEE_NODES),
    (r"CPU count|processors", "cpus_per_task", _SEE_NODES),
    (r"node configuration|Node count", "cpus_per_task, mem, gpus or constraint", _SEE_NODES),
]


def _explain_refusal(problem: Problem) -> Problem:
    if not problem.why.startswith("sbatch:"):  # not installed, or no answer
        return problem
    for pattern, keys, fix in _REFUSALS:
        if re.search(pattern, problem.why):
            return replace(problem, what="Slurm refuses the job", fix=f"change launch.slurm.{keys}; {fix}")
    return replace(problem, what="Slurm refuses the job")


def find_job(job_id: str) -> Job | None:
    """A job, or None where Slurm has forgotten it."""
    try:
        text = call("scontrol", "show", "job", job_id)
    except TplaunchError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    jobs = parse_jobs(text)
    return next((job for job in jobs if job.id == job_id), jobs[0] if jobs else None)


def find_jobs(job_ids: Sequence[str]) -> dict[str, Standing]:
    """How jobs stand, by number, in the order asked; those that Slurm has forgotten are missing.

    The controller is asked once for all of them.
    """
    if not job_ids:
        return {}
    # --array: also the tasks that wait, which Slurm keeps as one job, have a line each.
    fields = ":|,".join(["JobArrayID", "State", "Reason", "NodeList", "RestartCnt", ""])
    options = ["--noheader", "--array", "--states=all", f"--Format={fields.rstrip(',')}"]
    try:
        text = call("squeue", *options, f"--jobs={','.join(job_ids)}")
    except TplaunchError as error:
        if "Invalid job id" in str(error):  # said of one alone; of several those that are unknown are left out
            return {}
        raise
    found = {standing.id: standing for standing in parse_queue(text)}
    return {job_id: found[job_id] for job_id in job_ids if job_id in found}


def parse_queue(text: str) -> list[Standing]:
    """The jobs in the output of `squeue` as `find_jobs` asks for it: a line each, each field ended by "|"."""
    found = []
    for line in text.splitlines():
        job_id, state, reason, nodes, restarts = line.strip().split("|")[:5]
        known = "" if reason in _NOTHING else reason
        found.append(Standing(id=job_id, state=state, reason=known, nodes=nodes, restarts=int(restarts or 0)))
    return found


def parse_jobs(text: str) -> list[Job]:
    """The jobs in the output of `scontrol show job`, one for each record."""
    records = re.split(r"(?m)^(?=JobId=)", text)
    return [_parse_job(record) for record in records if record.startswith("JobId=")]


def _parse_job(record: str) -> Job:
    # The first of equal keys counts: paths and comments, which users write, come after all that is read here.
    fields: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", record):
        fields.setdefault(key, value)
    known = {key: value for key, value in fields.items() if value not in _NOTHING}
    array, task = known.get("ArrayJobId"), known.get("ArrayTaskId")
    start = known.get("StartTime")
    return Job(
        id=f"{array}_{task}" if array and task else fields["JobId"],
        state=known.get("JobState", "UNKNOWN"),
        reason=known.get("Reason", ""),
        nodes=known.get("NodeList", ""),
        excluded=known.get("ExcNodeList", ""),
        restarts=int(known.get("Restarts", 0)),
        exit_code=int(known.get("ExitCode", "0:0").split(":")[0]),
        start=datetime.fromisoformat(start) if start else None,
        preempted="PreemptTime" in known,
        log=Path(log[1]) if (log := re.search(r"(?m)^\s+StdOut=(.+)$", record)) else None,
    )


def queue_position(job_id: str) -> tuple[int, int] | None:
    """(place, length) of a waiting job among the waiting jobs of its partition; None when it does not wait.

    Only jobs that Slurm lets this user see are counted.
    """
    lines = call("squeue", "--noheader", "--states=PENDING", "--sort=P,-p,i", "--format=%i %P").split("\n")
    waiting = [line.split() for line in lines if line.strip()]
    mine = next((partition for name, partition in waiting if name.split("_")[0] == job_id.split("_")[0]), None)
    if mine is None:
        return None
    rivals = [name.split("_")[0] for name, partition in waiting if partition == mine]
    return rivals.index(job_id.split("_")[0]) + 1, len(rivals)


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs at once; those that are gone already are no error."""
    if job_ids:
        call("scancel", "--quiet", *job_ids)


def ask_to_stop(job_id: str) -> None:
    """Ask a running job to save and stop in its own time: SIGTERM to its batch script alone."""
    call("scancel", "--quiet", "--batch", "--signal=TERM", job_id)


def requeue(job_id: str) -> None:
    """Send a running job back to the queue under the same number."""
    call("scontrol", "requeue", job_id)


def exclude_nodes(job_id: str, nodes: Sequence[str]) -> None:
    """Keep a waiting job from nodes, besides those that it is kept from already."""
    job = find_job(job_id)
    old = [job.excluded] if job and job.excluded else []
    call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join([*old, *nodes])}")


def node_names(nodes: str) -> list[str]:
    """n[1-3] -> n1, n2, n3, in Slurm's order."""
    return call("scontrol", "show", "hostnames", nodes).split()


# Pending reasons in plain words, by the part before a comma or parameter.
_WHY = {
    "Priority": "jobs with a higher priority are waiting too",
    "Resources": "waits for nodes to become free",
    "Dependency": "waits for another job to end",
    "BeginTime": "was requeued a moment ago; Slurm starts it again after a pause",
    "JobHeldUser": "held by you: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "launch.slurm.time is longer than the partition allows",
    "PartitionNodeLimit": "asks for more nodes than the partition has",
    "PartitionConfig": "asks for what the partition does not have",
    "ReqNodeNotAvail": "nodes it needs are down, reserved or excluded",
    "BadConstraints": "no node satisfies launch.slurm.constraint, GPUs, CPUs and memory at once",
    "InvalidAccount": "launch.slurm.account is not valid",
    "InvalidQOS": "launch.slurm.qos is not valid",
    "launch_failed_requeued_held": "could not be started and is held: scontrol release",
    "JobArrayTaskLimit": "waits for tasks of its own array",
    "NodeDown": "a node of it is down",
}


def explain_reason(reason: str) -> str:
    """A pending reason in plain words, where it has any, after Slurm's own word."""
    head = re.split(r"[,(]", reason)[0]
    if head in _WHY:
        return f"{head}: {_WHY[head]}"
    if head.startswith(("Assoc", "QOS", "Max")):
        return f"{head}: a limit of your account or quality of service is reached"
    return reason.replace("_", " ")
