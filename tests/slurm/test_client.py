"""What Slurm's commands print, read; and what is said when they fail."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from tplaunch.errors import TplaunchError
from tplaunch.slurm import client as slurm

# As Slurm 22.05 prints it, shortened by lines that are not read.
RUNNING = """JobId=12 JobName=tiny
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901758 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:04 TimeLimit=UNLIMITED TimeMin=N/A
   SubmitTime=2026-11-24T23:49:39 EligibleTime=2026-11-24T23:49:39
   StartTime=2026-11-24T23:49:40 EndTime=Unknown Deadline=N/A
   PreemptEligibleTime=2026-11-24T23:49:40 PreemptTime=2026-11-24T23:50:56
   Partition=main AllocNode:Sid=localhost:2627
   ReqNodeList=(null) ExcNodeList=n[7-8]
   NodeList=n[1-2,4]
   BatchHost=n1
   Command=/a/JobState=FAILED ExitCode=9:9
   WorkDir=/tmp
   StdOut=/a/Restarts=7 b/12.log
"""
PENDING = """JobId=18 ArrayJobId=18 ArrayTaskId=2 ArrayTaskThrottle=1 JobName=arr
   JobState=PENDING Reason=ReqNodeNotAvail,_UnavailableNodes:n1 Dependency=afterany:12(unfulfilled)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   StartTime=Unknown EndTime=Unknown Deadline=N/A
   PreemptEligibleTime=Unknown PreemptTime=None
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=(null)
"""
# Slurm 24.05 says more, and some of it otherwise.
NEWER = """JobId=77 JobName=tiny
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=1 Nice=0 Account=root QOS=normal WCKey=*
   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=75:0
   RunTime=00:01:00 TimeLimit=01:00:00 TimeMin=N/A
   StartTime=2026-01-05T10:00:00 EndTime=2026-01-05T10:01:00 Deadline=N/A
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-01-05T10:00:00 Scheduler=Backfill
   Partition=gpu AllocNode:Sid=login1:9
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=gpu-a[001-004]
   ReqTRES=cpu=4,mem=16000M,node=1,billing=4
   AllocTRES=cpu=8,mem=32000M,node=1,billing=8
   StdOut=/home/me/runs/tiny/slurm/77.log
   TresPerNode=gres/gpu:8
"""


def test_a_running_job_is_read() -> None:
    (job,) = slurm.parse_jobs(RUNNING)
    assert job == slurm.Job(
        id="12",
        state="RUNNING",
        reason="",
        nodes="n[1-2,4]",
        excluded="n[7-8]",
        restarts=2,
        exit_code=0,
        start=datetime(2026, 11, 24, 23, 49, 40),
        preempted=True,
        log=Path("/a/Restarts=7 b/12.log"),
    )
    assert job.open


def test_a_waiting_task_of_an_array_is_read() -> None:
    (job,) = slurm.parse_jobs(PENDING)
    assert (job.id, job.state, job.nodes, job.start, job.preempted) == ("18_2", "PENDING", "", None, False)
    assert job.reason == "ReqNodeNotAvail,_UnavailableNodes:n1"


def test_a_newer_slurm_is_read() -> None:
    (job,) = slurm.parse_jobs(NEWER)
    assert (job.state, job.exit_code, job.nodes, job.open) == ("FAILED", 75, "gpu-a[001-004]", False)


def test_several_records_are_told_apart() -> None:
    assert [job.id for job in slurm.parse_jobs(f"{RUNNING}\n{PENDING}\n{NEWER}")] == ["12", "18_2", "77"]
    assert slurm.parse_jobs("") == []


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "Resources: waits for nodes"),
        ("ReqNodeNotAvail,_UnavailableNodes:n1", "ReqNodeNotAvail: nodes it needs"),
        ("AssocGrpGRES", "a limit of your account"),
        ("QOSMaxJobsPerUserLimit", "a limit of your account"),
        ("SomeNews_of_2031", "SomeNews of 2031"),
        ("", ""),
    ],
)
def test_reasons_are_put_in_plain_words(reason: str, words: str) -> None:
    assert words in slurm.explain_reason(reason)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return make


def test_a_machine_without_slurm_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TplaunchError, match="sbatch is not installed here") as caught:
        slurm.submit(tmp_path / "job")
    assert "tplaunch train" in str(caught.value)


def test_slurms_own_message_is_passed_on(fake, tmp_path: Path) -> None:
    fake("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    with pytest.raises(TplaunchError, match="invalid partition specified: nope"):
        slurm.submit(tmp_path / "job")


def test_a_controller_that_does_not_answer_is_told_so(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("scontrol", "exec sleep 30")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.3)
    with pytest.raises(TplaunchError, match="scontrol ping"):
        slurm.find_job("1")


def test_the_job_number_is_read_also_from_a_federation(fake, tmp_path: Path) -> None:
    fake("sbatch", 'echo "$*" >"${0%/*}/asked"; echo "123;north"')
    assert slurm.submit(tmp_path / "job", after="122") == "123"
    assert (tmp_path / "asked").read_text().strip() == f"--parsable --dependency=afterany:122 {tmp_path / 'job'}"


def test_a_forgotten_job_is_none(fake) -> None:
    fake("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.find_job("12") is None


def test_the_place_in_the_queue_counts_the_same_partition(fake) -> None:
    fake("squeue", "printf '9 cpu\\n5 gpu\\n7_[0-3%%2] gpu\\n8 gpu\\n'")
    assert slurm.queue_position("7") == (2, 3)
    assert slurm.queue_position("7_2") == (2, 3)
    assert slurm.queue_position("9") == (1, 1)
    assert slurm.queue_position("4") is None
