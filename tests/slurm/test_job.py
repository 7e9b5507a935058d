"""Inside a job: what is decided when the ranks have ended, how signals travel, how nodes are ordered and left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stories import history
from tplaunch.errors import Exit
from tplaunch.files import read_lines
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Done, Submitted
from tplaunch.run.heartbeat import Heartbeat
from tplaunch.slurm.job import judge_job
from tplaunch.slurm.nodes import order_nodes
from tplaunch.slurm.own_job import own_job_id

FAILED_ONCE = history("submit", "attempt", "start")
STOPPED = history("submit", "attempt", "start", "checkpoint:3", "stopped:3")
DONE = history("submit", "attempt", "start", "checkpoint:8", "done:8")
THREE = history("submit", "attempt", "attempt", "attempt")


@pytest.mark.parametrize(
    ("log", "told", "state", "preempted", "may", "code", "then", "last"),
    [
        (DONE, None, "RUNNING", False, "requeue", Exit.DONE, "end", True),
        (DONE, "USR1", "RUNNING", False, "requeue", Exit.DONE, "end", True),
        (DONE, "TERM", "COMPLETING", True, "requeue", Exit.DONE, "end", True),
        (STOPPED, "USR1", "RUNNING", False, "requeue", Exit.STOPPED, "requeue", False),
        (STOPPED, "USR1", "RUNNING", False, "restart", Exit.STOPPED, "end", False),  # the chain goes on
        (STOPPED, None, "RUNNING", True, "restart requeue", Exit.STOPPED, "requeue", False),
        (STOPPED, None, "RUNNING", True, "", Exit.STOPPED, "end", False),
        (STOPPED, "TERM", "RUNNING", False, "restart requeue", Exit.STOPPED, "end", True),
        (STOPPED, None, "RUNNING", False, "requeue", Exit.STOPPED, "end", True),  # scancel --signal=TERM to the steps
        (STOPPED, "TERM", "COMPLETING", False, "requeue", Exit.STOPPED, "end", False),  # scancel, scontrol requeue
        (STOPPED, "TERM", "COMPLETING", True, "requeue", Exit.STOPPED, "end", False),  # Slurm requeues it itself
        (FAILED_ONCE, None, "RUNNING", False, "requeue", Exit.FAILED, "requeue", False),
        (FAILED_ONCE, None, "RUNNING", False, "restart requeue", Exit.FAILED, "again", False),
        (FAILED_ONCE, None, "RUNNING", False, "restart", Exit.FAILED, "again", False),
        (FAILED_ONCE, None, "RUNNING", False, "", Exit.FAILED, "end", False),
        (FAILED_ONCE, "USR1", "RUNNING", False, "restart requeue", Exit.FAILED, "requeue", False),
        (FAILED_ONCE, "TERM", "RUNNING", False, "restart requeue", Exit.FAILED, "end", True),
        (FAILED_ONCE, None, "COMPLETING", False, "restart requeue", Exit.FAILED, "end", False),
        (THREE, None, "RUNNING", False, "restart requeue", Exit.FAILED, "end", True),
        (THREE, None, "RUNNING", True, "restart requeue", Exit.FAILED, "end", True),
    ],
)
def test_the_verdict(log, told, state, preempted, may, code, then, last) -> None:
    allowed = {"may_restart": "restart" in may, "may_requeue": "requeue" in may}
    verdict = judge_job(log, told=told, state=state, preempted=preempted, **allowed)
    assert (verdict.code, verdict.then, verdict.last) == (code, then, last)


def test_nodes_on_one_switch_come_side_by_side() -> None:
    tree = {"n1": "s0.s1.n1", "n2": "s0.s2.n2", "n3": "s0.s1.n3", "n4": "s0.s2.n4", "n10": "s9.s5.n10"}
    assert order_nodes(["n1", "n2", "n3", "n4", "n10"], tree) == ["n1", "n3", "n2", "n4", "n10"]
    deep = {"a": "t.l1.u1.a", "b": "t.l2.u3.b", "c": "t.l1.u2.c", "d": "t.l1.u1.d"}
    assert order_nodes(["a", "b", "c", "d"], deep) == ["a", "d", "c", "b"]
    flat = {f"n{k}": f"n{k}" for k in (10, 2, 1)}
    assert order_nodes(["n10", "n2", "n1"], flat) == ["n10", "n2", "n1"]


def test_a_task_of_an_array_knows_its_name() -> None:
    assert own_job_id({"SLURM_JOB_ID": "7"}) == "7"
    assert own_job_id({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "7_2"


# ---- the program, with Slurm's commands replaced by recorders

SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case "$1 $2" in
    "show hostnames") echo "n1 n2 n3 n4" | tr ' ' '\\n' ;;
    "show job") cat "$JOB" ;;
esac
"""
JOB = """JobId=7 JobName=tiny
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None
   ReqNodeList=(null) ExcNodeList=n9
   NodeList=n[1-4]
"""
RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 2, num_heads: 4, ffn_hidden_size: 64, vocab_size: 512}
topology: {tp: 2, pp: 2, dp: 1, nodes: 2}
training: {seq_len: 32, global_batch_size: 8, steps: 8}
data: {train: nowhere}
"""
# What the ranks do, in place of srun and everything below it.
RANKS = """
import json, os, signal, sys, time
def say(event, **fields):
    with open(os.path.join(sys.argv[1], "events.jsonl"), "a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\\n")
def stop(*_):
    say("checkpoint", step=3); say("stopped", step=3); sys.exit(0)
kind = sys.argv[2]
say("start", attempt=int(os.environ["TPLAUNCH_ATTEMPT"]))
if kind == "done":
    say("checkpoint", step=8); say("done", step=8)
elif kind == "fail":
    sys.exit(7)
elif kind == "profile":
    signal.signal(signal.SIGUSR2, lambda *_: (
        say("profiled", first=3, last=4, rank=0, trace="t"), say("checkpoint", step=8), say("done", step=8), sys.exit(0)
    ))
    print("ready", flush=True); time.sleep(60)
elif kind == "late":  # the first signal comes too early
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(1.5)
    signal.signal(signal.SIGUSR1, stop); time.sleep(60)
else:
    signal.signal(signal.SIGUSR1, stop); print("ready", flush=True); time.sleep(60)
"""


class Desk:
    """A run directory, a fake Slurm and the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = RunDir(folder / "run")
        self.run_dir.create()
        self.run_dir.slurm.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE)
        self.run_dir.recipe.write_text(dump_recipe(load_recipe(folder / "recipe.yaml").recipe))
        self.run_dir.append(Submitted(jobs=["7", "8", "9"], logs=["a", "b", "c"]))
        (folder / "bin").mkdir()
        for name, text in {"scontrol": SCONTROL, "scancel": '#!/bin/bash\necho "scancel $*" >>"$CALLS"\n'}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "job").write_text(JOB)
        (folder / "hosts").write_text("n1\nn3\n")
        (folder / "ranks.py").write_text(RANKS)

    @property
    def environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.folder / "calls"),
            "JOB": str(self.folder / "job"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-4]",
            "SLURM_HOSTFILE": str(self.folder / "hosts"),
        }

    def calls(self, without: str = "scontrol show") -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith(without)]

    def start(self, *argv: str, stdin: str = "") -> subprocess.Popen:
        (self.folder / "stdin").write_text(stdin)
        return subprocess.Popen(
            [sys.executable, "-m", "tplaunch.slurm.job", argv[0], str(self.run_dir.root), *argv[1:]],
            env=self.environ,
            stdin=(self.folder / "stdin").open(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ranks(self, kind: str) -> subprocess.Popen:
        return self.start("run", sys.executable, str(self.folder / "ranks.py"), str(self.run_dir.root), kind)

    def wait_for_ranks(self, attempt: int = 1) -> None:
        log = self.run_dir.torchrun_log(attempt)
        deadline = time.monotonic() + 60
        while not (log.exists() and "ready" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_run_that_is_done_cancels_the_rest_of_its_chain(desk: Desk) -> None:
    program = desk.ranks("done")
    _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.DONE, errors
    assert "attempt 1, job 7, nodes n1 n3" in errors
    assert "the last step is done" in errors
    assert desk.calls() == ["scancel --quiet 8 9"]
    names = [event["event"] for event in read_lines(desk.run_dir.events)]
    assert names == ["submit", "attempt", "start", "checkpoint", "done", "attempt_end"]


def test_a_run_that_is_done_already_starts_nothing(desk: Desk) -> None:
    desk.run_dir.append(Done(step=8))
    program = desk.ranks("fail")
    assert program.wait(60) == Exit.DONE
    assert read_lines(desk.run_dir.events)[-1]["event"] == "done"
    assert desk.calls() == ["scancel --quiet 8 9"]


def test_a_run_that_has_been_given_more_steps_goes_on(desk: Desk) -> None:
    desk.run_dir.append(Done(step=5))
    assert desk.ranks("done").wait(60) == Exit.DONE
    assert read_lines(desk.run_dir.events)[-2]["step"] == 8


def errors_of_a_warned_job(desk: Desk, ranks: str) -> str:
    """What a job says that stops as Slurm warns it of its time limit."""
    program = desk.ranks(ranks)
    desk.wait_for_ranks()
    program.send_signal(signal.SIGUSR1)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.STOPPED, errors
    return str(errors)


def test_slurms_warning_reaches_the_ranks_and_the_job_is_requeued(desk: Desk) -> None:
    errors = errors_of_a_warned_job(desk, "train")
    assert "the time limit is near" in errors
    assert desk.calls() == ["scontrol requeue 7"]


def test_a_profile_is_asked_of_the_ranks_once_they_train(desk: Desk) -> None:
    """USR2, as `scancel --batch --signal=USR2` sends it; before the ranks train, it waits for them."""
    program = desk.ranks("profile")
    desk.wait_for_ranks()
    program.send_signal(signal.SIGUSR2)
    time.sleep(1.5)
    assert "profiled" not in desk.run_dir.events.read_text()
    Heartbeat(desk.run_dir.beat(1, 0), 0).mark(1, "data")
    output, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.DONE, errors
    assert "asked for a profile" in errors
    assert "profile of steps 3 to 4 of rank 0: t" in output


def test_ranks_that_miss_the_first_signal_get_another(desk: Desk) -> None:
    errors = errors_of_a_warned_job(desk, "late")
    assert errors.count("told to stop") == 1


def test_a_users_wish_to_stop_is_not_requeued_and_ends_the_chain(desk: Desk) -> None:
    program = desk.ranks("train")
    desk.wait_for_ranks()
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.STOPPED, errors
    assert desk.calls() == ["scancel --quiet 8 9"]


def test_a_users_wish_outlives_slurms_warning(desk: Desk) -> None:
    program = desk.ranks("late")
    desk.wait_for_ranks()
    program.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    program.send_signal(signal.SIGUSR1)
    program.communicate(timeout=60)
    assert desk.calls() == ["scancel --quiet 8 9"]


def test_a_preempted_job_requeues_itself(desk: Desk) -> None:
    """Slurm signals the ranks alone, and does not requeue a preempted job that ends within its grace time."""
    (desk.folder / "job").write_text(JOB.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:01:00"))
    program = desk.ranks("train")
    desk.wait_for_ranks()
    (ranks,) = (int(child) for child in Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split())
    os.kill(ranks, signal.SIGUSR1)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.STOPPED, errors
    assert desk.calls() == ["scontrol requeue 7"]


def test_three_failures_without_progress_are_enough(desk: Desk) -> None:
    codes, said = [], []
    for _ in range(3):
        program = desk.ranks("fail")
        _, errors = program.communicate(timeout=60)
        codes.append(program.returncode)
        said.append(errors)
    assert codes == [Exit.FAILED] * 3
    assert "attempt 1 of at most 3 without a new checkpoint" in said[0]
    assert "giving up" in said[2]
    assert desk.calls() == ["scontrol requeue 7", "scontrol requeue 7", "scancel --quiet 8 9"]


def test_failed_ranks_are_started_again_in_the_same_job(desk: Desk) -> None:
    text = desk.run_dir.recipe.read_text()
    desk.run_dir.recipe.write_text(text.replace("max_restarts: 0", "max_restarts: 1"))
    program = desk.ranks("fail")
    _, errors = program.communicate(timeout=60)
    assert "once more, 1 of at most 1 times" in errors
    assert [e["attempt"] for e in read_lines(desk.run_dir.events) if e["event"] == "attempt"] == [1, 2]
    assert desk.calls() == ["scontrol requeue 7"]


def test_a_refused_requeue_says_what_to_do(desk: Desk) -> None:
    (desk.folder / "bin" / "scontrol").write_text(
        SCONTROL.replace(
            "esac", '    "requeue 7") echo "Requested operation is presently disabled" >&2; exit 1 ;;\nesac'
        )
    )
    program = desk.ranks("fail")
    _, errors = program.communicate(timeout=60)
    assert "Requested operation is presently disabled" in errors
    assert "--chain" in errors
    assert program.returncode == Exit.FAILED


def test_a_done_run_is_done_also_when_slurm_is_away(desk: Desk) -> None:
    for name in ("scontrol", "scancel"):
        (desk.folder / "bin" / name).write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    program = desk.ranks("done")
    _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.DONE, errors
    assert "Unable to contact" in errors


def test_two_jobs_on_one_run_directory_are_refused(desk: Desk) -> None:
    with desk.run_dir.lock():
        program = desk.ranks("done")
        _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.USAGE
    assert "another launch is using" in errors


def report(node: str, *problems: str) -> str:
    switch = "s1" if node in ("n1", "n3") else "s2"
    return json.dumps({"node": node, "address": f"s0.{switch}.{node}", "problems": list(problems)})


def test_good_nodes_are_put_in_order(desk: Desk) -> None:
    lines = ["a line of a container", *(report(f"n{k}") for k in (4, 2, 1, 3))]
    program = desk.start("nodes", stdin="\n".join(lines))
    output, _ = program.communicate(timeout=60)
    assert (program.returncode, output.split()) == (Exit.DONE, ["n1", "n3", "n2", "n4"])


def test_a_node_that_says_nothing_is_taken_as_it_is(desk: Desk) -> None:
    program = desk.start("nodes", stdin=report("n3"))
    output, _ = program.communicate(timeout=60)
    assert (program.returncode, output.split()) == (Exit.DONE, ["n1", "n2", "n3", "n4"])


def test_a_bad_node_is_left_out_of_the_next_attempt(desk: Desk) -> None:
    lines = [report("n1"), report("n2", "GPU 3: uncorrected ECC errors"), report("n3"), report("n4")]
    program = desk.start("nodes", stdin="\n".join(lines))
    output, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.STOPPED and output == ""
    assert "node n2 is not fit: GPU 3: uncorrected ECC errors" in errors
    assert desk.calls() == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9,n2"]
    assert read_lines(desk.run_dir.events)[-1]["nodes"] == ["n2"]


def test_a_bad_node_is_left_out_of_the_rest_of_a_chain(desk: Desk) -> None:
    text = desk.run_dir.recipe.read_text()
    assert "requeue: true" in text
    desk.run_dir.recipe.write_text(text.replace("requeue: true", "requeue: false"))
    program = desk.start("nodes", stdin=report("n2", "bad"))
    assert program.wait(60) == Exit.FAILED
    assert desk.calls() == [f"scontrol update JobId={job} ExcNodeList=n9,n2" for job in (8, 9)]


def test_a_complaint_of_every_node_is_not_the_nodes_fault(desk: Desk) -> None:
    program = desk.start("nodes", stdin="\n".join(report(f"n{k}", "no space") for k in range(1, 5)))
    _, errors = program.communicate(timeout=60)
    assert program.returncode == Exit.FAILED
    assert "the cause is not a node" in errors
    assert desk.calls() == []


def test_commands_started_after_a_requeue_outlive_slurms_term(desk: Desk) -> None:
    """Slurm ends a requeued job's processes at once; the list of bad nodes must be set nevertheless."""
    (desk.folder / "bin" / "scontrol").write_text(
        SCONTROL.replace("#!/bin/bash", "#!/bin/bash\n[[ $1 == update ]] && kill -TERM $$ && kill -TERM $PPID")
    )
    program = desk.start("nodes", stdin=report("n2", "bad"))
    _, errors = program.communicate(timeout=60)
    assert desk.calls()[-1] == "scontrol update JobId=7 ExcNodeList=n9,n2", errors
    assert "back to the queue without n2" in errors
