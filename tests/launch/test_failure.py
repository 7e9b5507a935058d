"""The root cause of a failed launch, from what torchrun and the ranks have left behind."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from tests.recipes import case, resolved
from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.launch.failure import Cause, find_cause, print_cause
from tplaunch.plan.case import Case
from tplaunch.plan.estimate import estimate
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.heartbeat import Heartbeat
from tplaunch.spec.gpu import find_gpu
from tplaunch.units import GiB


class Attempt:
    """A failed attempt, built up from the ends of its ranks."""

    def __init__(self, root: Path) -> None:
        self.run = RunDir(root)
        self.run.create()
        self.number = self.run.next_attempt()
        self.told: list[str] = []
        self.summary: list[str] = []

    def ended(self, rank: int, code: int, *, told: bool = False) -> None:
        pid = 1000 + rank
        if told:
            self.told.append(f"W1124 23:12:01.000 99 api.py:1004] Sending process {pid} closing signal SIGTERM")
        self.summary += [
            f"[{len(self.summary)}]:",
            "  time      : 2026-11-24_23:12:02",
            "  host      : node1",
            f"  rank      : {rank} (local_rank: {rank})",
            f"  exitcode  : {code} (pid: {pid})",
            "  error_file: <N/A>",
        ]

    def raised(self, rank: int, time: float, kind: str = "RuntimeError", message: str = "") -> None:
        message = message or f"of rank {rank}"
        traceback = f"Traceback (most recent call last):\n  File x, line 1\n    fails()\n{kind}: {message}\n"
        account = {"rank": rank, "tp": rank, "pp": 0, "dp": 0, "host": "node1", "time": time}
        account |= {"step": 7, "doing": "gradients", "collective": "gloo:all_reduce of [[3]]"}
        account |= {"type": kind, "message": message, "traceback": traceback}
        self.run.rank_error(self.number, rank).write_text(json.dumps(account))

    def printed(self, rank: int, text: str) -> None:
        self.run.rank_log(self.number, rank).write_text(text)

    def cause(self) -> Cause:
        self.run.torchrun_log(self.number).write_text("\n".join([*self.told, "Failures:", *self.summary]))
        return find_cause(self.run, self.number)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


def test_the_earliest_exception(attempt: Attempt) -> None:
    attempt.ended(0, 1, told=True)
    attempt.ended(1, 1)
    attempt.raised(0, time=20.0)
    attempt.raised(1, time=10.0, kind="ValueError", message="two\nlines")
    cause = attempt.cause()
    assert (cause.rank, cause.host, cause.what) == (1, "node1", "ValueError: two\nlines")
    where = "in step 7, gradients, last collective gloo:all_reduce of [[3]]"
    assert cause.detail == f"Traceback (most recent call last):\n  File x, line 1\n    fails()\n{where}"
    assert cause.log == attempt.run.rank_log(1, 1)


def test_a_rank_killed_outright_comes_before_its_peers_exceptions(attempt: Attempt) -> None:
    attempt.ended(0, 1)
    attempt.ended(1, -9)
    attempt.raised(0, time=10.0, message="connection reset by peer")
    attempt.printed(1, "\n".join(f"line {i}" for i in range(100)))
    cause = attempt.cause()
    assert (cause.rank, cause.what) == (1, "killed by SIGKILL")
    assert cause.detail.startswith("line 86") and cause.detail.endswith("line 99")
    assert "dmesg" in cause.advice


def test_ranks_that_the_launcher_killed_are_no_cause(attempt: Attempt) -> None:
    attempt.ended(0, -9, told=True)
    attempt.ended(1, 1)
    attempt.raised(1, time=10.0)
    assert attempt.cause().rank == 1


def test_an_abort_that_follows_an_exception_elsewhere(attempt: Attempt) -> None:
    attempt.ended(0, -6)
    attempt.ended(1, 1)
    attempt.raised(1, time=10.0)
    assert attempt.cause().rank == 1


def test_an_abort_that_is_the_cause(attempt: Attempt) -> None:
    attempt.ended(0, -6)
    attempt.ended(1, 1, told=True)
    attempt.raised(1, time=10.0)
    cause = attempt.cause()
    assert (cause.rank, cause.what) == (0, "killed by SIGABRT")


def test_the_rank_that_others_waited_for_in_vain(attempt: Attempt) -> None:
    attempt.ended(0, 1)
    attempt.raised(0, time=10.0, message="[x.cc:78] Timed out waiting 9000ms for recv operation to complete")
    for rank, doing in enumerate(["gradients", "forward and backward", "data", "forward and backward"]):
        if rank:
            attempt.ended(rank, -15, told=True)
        Heartbeat(attempt.run.beat(1, rank), rank).mark(7, doing)
    attempt.printed(2, "its last words")
    cause = attempt.cause()
    assert cause.rank == 2 and cause.detail == "its last words"
    assert re.match(r"did not arrive: last seen at \d\d:\d\d:\d\d in step 7, data; rank 0 waited", cause.what)
    assert "step 7, gradients, last collective gloo:all_reduce of [[3]]: [x.cc:78] Timed out" in cause.what
    assert cause.advice == ""
    attempt.run.rank_flight(1, 0).touch()
    assert attempt.cause().advice == f"the last collectives of rank 0: {attempt.run.rank_flight(1, 0)}"


def test_where_nccls_watchdog_gave_up_too(attempt: Attempt) -> None:
    attempt.ended(1, -6)
    attempt.printed(1, "start\n[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)\nend")
    for rank in range(3):
        if rank != 1:
            attempt.ended(rank, -9, told=True)
        Heartbeat(attempt.run.beat(1, rank), rank).mark(4, "data")
    cause = attempt.cause()
    assert cause.rank == 0 and "(nor did rank 2)" in cause.what
    (attempt.run.attempt_dir(1) / "nccl-flight-1").touch()
    assert attempt.cause().advice == (
        f"the last collectives of every rank: torchfrtrace -p nccl-flight- {attempt.run.attempt_dir(1)}"
    )
    assert cause.what.endswith("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)")


def test_an_exit_without_an_exception(attempt: Attempt) -> None:
    attempt.ended(1, 3)
    attempt.printed(1, "last words\n")
    cause = attempt.cause()
    assert (cause.rank, cause.what) == (1, "exit code 3, without an exception")
    assert (cause.detail, cause.log) == ("last words", attempt.run.rank_log(1, 1))


def test_an_end_before_the_rank_has_its_log(attempt: Attempt) -> None:
    attempt.told.append("Traceback\nModuleNotFoundError: tplaunch")
    attempt.ended(0, 1, told=True)
    attempt.ended(1, 1)
    cause = attempt.cause()
    assert (cause.rank, cause.detail) == (1, "Traceback\nModuleNotFoundError: tplaunch")
    assert cause.log == attempt.run.torchrun_log(1)


def test_torchrun_itself(attempt: Attempt) -> None:
    attempt.run.torchrun_log(1).write_text("No module named torch\n")
    cause = find_cause(attempt.run, 1)
    assert (cause.rank, cause.detail) == (None, "No module named torch")


@pytest.mark.parametrize("terminal", [True, False])
def test_print(attempt: Attempt, terminal: bool) -> None:
    attempt.ended(3, 1)
    attempt.raised(3, time=1.0, kind="OutOfMemoryError", message="tried to allocate [red] 2 GiB")
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, markup=False, highlight=False, color_system=None)
    print_cause(console, attempt.cause(), resolved(case(2, 2, 2)), "the same command goes on after step 5")
    text = out.getvalue()
    assert "Rank 3 failed (tp=1 dp=1 pp=0, node1)" in text
    assert "OutOfMemoryError: tried to allocate [red] 2 GiB" in text
    assert "training.micro_batch_size" in text
    assert "the same command goes on after step 5" in text
    assert ("╭" in text) == terminal
    if not terminal:
        assert f"log   {attempt.run.rank_log(1, 3)}\n" in text


def out_of_memory(attempt: Attempt, recipe: str, *settings: str, rank: int) -> tuple[Checked, list[str]]:
    """The checked recipe, and what is said of a rank of it that had not enough memory, from the log's line on."""
    checked = check_recipe(load_recipe(recipe, settings), need_data=False)
    attempt.ended(rank, 1)
    attempt.raised(rank, time=1.0, kind="OutOfMemoryError", message="CUDA out of memory. Tried to allocate 2.00 GiB")
    out = io.StringIO()
    console = Console(file=out, markup=False, highlight=False, color_system=None)
    print_cause(console, attempt.cause(), checked.recipe, "go on")
    lines = out.getvalue().splitlines()
    return checked, lines[next(n for n, line in enumerate(lines) if line.startswith("log ")) + 1 :]


def setting(line: str) -> list[str]:
    """The settings that a line offers, as a shell would read them."""
    words = shlex.split(line[6:].partition("  (")[0])
    return words[1::2]


def test_a_rank_without_memory_is_told_what_was_expected_and_what_would_fit(attempt: Attempt) -> None:
    """On GPUs that are too small: the planner's bytes of that rank, and changes that fit when they are made."""
    small = ("hardware.gpu=a100-40gb", "training.micro_batch_size=8", "training.recompute=none")
    checked, lines = out_of_memory(attempt, "llama3-8b", "topology.tp=4", "topology.pp=2", *small, rank=5)
    memory = estimate(Case(checked.recipe, find_gpu("a100-40gb"))).memory[1]
    assert lines[0].startswith(f"plan  rank 5 (pp 1) was to take {memory.total / GiB:.1f} GiB of a100-40gb's 39.4, ")
    assert lines[0].endswith(" more than there is")
    assert (
        f"activations {memory.activations / GiB:.1f}, " in lines[1]
        and f"optimizer {memory.optimizer / GiB:.1f}" in lines[1]
    )
    fixes = lines[2:-1]
    assert fixes[0].startswith("fix   --set ") and lines[-1] == "next  go on"
    assert any("training.recompute" in line for line in fixes)
    for fix in fixes:
        mended = ["topology.tp=4", "topology.pp=2", *small, *setting(fix)]
        recipe = check_recipe(load_recipe("llama3-8b", mended), need_data=False).recipe
        assert estimate(Case(recipe, find_gpu("a100-40gb"))).fits, fix


def test_a_rank_without_memory_that_the_plan_had_given_enough(attempt: Attempt) -> None:
    checked, lines = out_of_memory(attempt, "llama3-8b", "training.recompute=none", rank=0)
    gpu = find_gpu("h100-80gb")
    planned = estimate(Case(checked.recipe, gpu))
    assert planned.fits
    assert "which leaves" in lines[0] and "took more than planned" in lines[2]
    fixes = lines[3:-1]
    assert any("training.recompute" in line for line in fixes)
    for fix in fixes:
        recipe = check_recipe(
            load_recipe("llama3-8b", ["training.recompute=none", *setting(fix)]), need_data=False
        ).recipe
        then = estimate(Case(recipe, gpu))
        assert then.memory[then.fullest].total < 0.951 * planned.memory[0].total, fix


def test_a_gpu_that_the_table_lacks_has_no_account(attempt: Attempt) -> None:
    _, lines = out_of_memory(attempt, "llama3-8b", "hardware.gpu=null", rank=0)
    assert lines[0].startswith("next  lower training.micro_batch_size")
    assert lines[1:] == ["next  go on"]
