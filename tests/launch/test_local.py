"""The launcher with a real torchrun and stand-in workers: how a launch ends, what it says, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stories import history
from tplaunch.check.recipe import check_recipe
from tplaunch.errors import Exit
from tplaunch.files import read_lines
from tplaunch.launch.local import LocalLaunch
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.processes import LAUNCH_ID, end_launch, processes_of

FAKES = Path(__file__).parent / "fakes"


class Launch:
    """A launcher process and the run directory it works in."""

    def __init__(
        self, root: Path, plan: dict[str, object], grace_s: float = 60.0, max_restarts: int = 0, resume: str = "auto"
    ) -> None:
        self.run = RunDir(root)
        paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, str(FAKES / "launch.py"), str(root), str(grace_s), str(max_restarts), resume],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FAKE_WORKER": json.dumps(plan)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(r["step"] >= step for r in self.run.read_metrics()))

    def end(self) -> tuple[Exit, str, str]:
        out, err = self.process.communicate(timeout=90)
        return Exit(self.process.returncode), out, err

    def worker_pids(self) -> list[int]:
        return [int((self.run.root / f"pid-{rank}").read_text()) for rank in range(2)]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def mine() -> set[int]:
    """Processes of any launch of this test: torchrun, workers and what they have started."""
    marked = set()
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes() if entry.name.isdecimal() else b""
        except OSError:
            continue
        if f"{LAUNCH_ID}=".encode() in environment and str(FAKES).encode() in environment:
            marked.add(int(entry.name))
    return marked


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    launches: list[Launch] = []

    def start(plan: dict[str, object], **more: Any) -> Launch:
        launches.append(Launch(tmp_path / "run", plan, **more))
        return launches[-1]

    yield start
    for started in launches:
        started.process.kill()
        started.process.communicate()
    deadline = time.monotonic() + 10
    while mine() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mine() == set(), "processes outlived their launch"


def test_done(launch: Callable[..., Launch]) -> None:
    started = launch({})
    code, out, err = started.end()
    assert (code, err) == (Exit.DONE, "")
    assert "tp 2 x pp 1 x dp 1 = 2 ranks" in out
    assert "step 6/6  loss 1.6667  grad_norm 1.0000  lr 1.00e-03  5.00K tokens/s\n" in out
    assert f"run         {started.run.root}\n" in out
    assert mine() == set()
    assert started.run.rank_log(1, 1).read_text() == "rank 1 begins\n"


def test_the_first_rank_to_raise_is_named(launch: Callable[..., Launch]) -> None:
    started = launch({"1": "raise", "0": "raise because of rank 1"})
    code, _, err = started.end()
    assert code == Exit.FAILED
    assert "Rank 1 failed (tp=1 dp=0 pp=0, " in err
    assert "ValueError: the loss of rank's own making" in err
    assert 'raise ValueError("the loss of rank' in err
    assert "peer is gone" not in err
    assert str(started.run.rank_log(1, 1)) in err
    assert "the same command starts from the beginning" in err
    assert mine() == set()


def test_a_killed_rank_ends_the_launch_within_10_s_though_its_peers_hang(launch: Callable[..., Launch]) -> None:
    started = launch({"1": "sigkill", "peers": "hang"})
    started.wait_for(lambda: "last words" in read(started.run.rank_log(1, 1)))
    began = time.monotonic()
    code, _, err = started.end()
    assert time.monotonic() - began < 10
    assert code == Exit.FAILED
    assert "Rank 1 failed (tp=1 dp=0 pp=0)" in err
    assert "killed by SIGKILL" in err and "last words" in err and "dmesg" in err
    assert mine() == set()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)])
def test_stop_and_go_on(launch: Callable[..., Launch], number: signal.Signals) -> None:
    started = launch({"steps": 10_000})
    started.wait_for_step(2)
    started.process.send_signal(number)
    code, out, err = started.end()
    assert (code, err) == (Exit.STOPPED, "")
    assert "stopping after this step" in out
    assert f"stopped; the same command goes on after step {started.run.history().newest_checkpoint}\n" in out
    assert started.run.history().ending == "stopped"
    assert mine() == set()


@pytest.mark.faults
def test_a_second_interrupt_ends_at_once(launch: Callable[..., Launch]) -> None:
    started = launch({"0": "never stops", "1": "never stops", "steps": 10_000})
    started.wait_for_step(2)
    started.process.send_signal(signal.SIGINT)
    started.wait_for(lambda: "closing signal" in read(started.run.torchrun_log(1)))
    began = time.monotonic()
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.end()
    assert time.monotonic() - began < 10
    assert code == Exit.FAILED
    assert "ended before it could save; the same command starts from the beginning" in err
    assert mine() == set()


def test_a_profile_is_asked_of_the_ranks_that_the_recipe_lists(launch: Callable[..., Launch]) -> None:
    """SIGUSR2 ends neither launcher, nor torchrun, nor ranks, before they are ready for it or after."""
    started = launch({"steps": 10_000, "profiles": True})
    started.wait_for(lambda: started.run.torchrun_log(1).exists())
    time.sleep(0.3)
    started.process.send_signal(signal.SIGUSR2)
    started.wait_for_step(2)
    agent = parent(started.worker_pids()[0])
    os.kill(agent, signal.SIGUSR2)
    started.process.send_signal(signal.SIGUSR2)
    started.wait_for(lambda: "profiled" in read(started.run.events))
    started.wait_for_step(started.run.read_metrics()[-1]["step"] + 3)
    started.process.send_signal(signal.SIGINT)
    code, out, err = started.end()
    assert (code, err) == (Exit.STOPPED, "")
    assert [event["rank"] for event in read_lines(started.run.events) if event["event"] == "profiled"] == [0]
    assert "no profile yet: the ranks are still starting; SIGUSR2 asks again\n" in out
    assert "asked rank 0 for a profile\n" in out
    assert "profile of steps 1 to 2 of rank 0: t.json.gz (ui.perfetto.dev)\n" in out


def test_ranks_that_are_not_ready_for_a_profile_ignore_the_signal(launch: Callable[..., Launch]) -> None:
    started = launch({"steps": 10_000})
    started.wait_for_step(2)
    for pid in started.worker_pids():
        os.kill(pid, signal.SIGUSR2)
    started.wait_for_step(4)
    started.process.send_signal(signal.SIGINT)
    assert started.end()[0] == Exit.STOPPED


def test_nothing_is_left_when_the_launcher_is_killed(launch: Callable[..., Launch]) -> None:
    started = launch({"steps": 10_000, "1": "never stops"})
    started.wait_for_step(2)
    workers = started.worker_pids()
    started.process.kill()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    with started.run.lock():
        pass


@pytest.mark.faults
def test_a_failed_run_is_started_again(launch: Callable[..., Launch]) -> None:
    started = launch({"1": "sigkill", "peers": "hang", "in attempts": "1"}, max_restarts=1)
    code, out, err = started.end()
    assert code == Exit.DONE
    assert [e["event"] for e in read_lines(started.run.events)] == [
        *("attempt", "start", "attempt_end"),
        *("attempt", "start", "done", "attempt_end"),
    ]
    assert "Rank 1 failed (tp=1 dp=0 pp=0)" in err and "restart 1 of at most 1 without a new checkpoint" in err
    assert "step 6/6" in out


@pytest.mark.faults
def test_a_restart_that_gets_on_does_not_count(launch: Callable[..., Launch]) -> None:
    started = launch({"1": "sigkill", "peers": "hang", "saves in attempts": "2"}, max_restarts=1, resume="none")
    code, _, err = started.end()
    assert code == Exit.FAILED
    assert [e["resume"] for e in read_lines(started.run.events) if e["event"] == "start"] == ["none", "none", "auto"]
    assert err.count("restart 1 of at most 1 without a new checkpoint") == 2
    assert err.count("the same command goes on after step 2") == 1


@pytest.mark.faults
def test_what_a_worker_leaves_behind_is_ended(launch: Callable[..., Launch]) -> None:
    assert launch({"1": "leave a child"}).end()[0] == Exit.DONE
    assert mine() == set()


@pytest.mark.faults
def test_a_stop_before_training_begins(launch: Callable[..., Launch]) -> None:
    started = launch({"steps": 10_000})
    started.wait_for(lambda: started.run.torchrun_log(1).exists())
    time.sleep(0.5)
    started.process.send_signal(signal.SIGTERM)
    assert started.end()[0] == Exit.STOPPED


@pytest.mark.faults
def test_repeated_sigterm_leaves_time_to_save(launch: Callable[..., Launch]) -> None:
    started = launch({"steps": 10_000})
    started.wait_for_step(2)
    for _ in range(3):
        started.process.send_signal(signal.SIGTERM)
    assert started.end()[0] == Exit.STOPPED


@pytest.mark.faults
def test_workers_that_do_not_stop_are_ended_after_their_grace(launch: Callable[..., Launch]) -> None:
    started = launch({"0": "never stops", "1": "never stops", "steps": 10_000}, grace_s=1.0)
    started.wait_for_step(2)
    started.process.send_signal(signal.SIGTERM)
    code, _, err = started.end()
    assert code == Exit.FAILED
    assert "ended before it could save" in err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "what"), [("segv", "killed by SIGSEGV"), ("exit 3", "exit code 3, without an exception")]
)
def test_other_ends(launch: Callable[..., Launch], how: str, what: str) -> None:
    started = launch({"0": how, "peers": "hang"})
    code, _, err = started.end()
    assert code == Exit.FAILED
    assert "Rank 0 failed (tp=0 dp=0 pp=0)" in err and what in err


@pytest.mark.faults
def test_a_torchrun_that_is_killed_takes_its_workers_along(launch: Callable[..., Launch]) -> None:
    started = launch({"steps": 10_000})
    started.wait_for_step(2)
    os.kill(parent(started.worker_pids()[0]), signal.SIGKILL)
    code, _, err = started.end()
    assert code == Exit.FAILED
    assert "torchrun failed" in err
    assert mine() == set()


@pytest.mark.parametrize(
    ("code", "events", "asked", "end"),
    [
        (0, ["start", "done:3"], False, Exit.DONE),
        (0, ["start", "stopped:3"], False, Exit.STOPPED),  # a batch system has told the workers itself
        (1, ["start", "stopped:3"], True, Exit.STOPPED),
        (1, ["start", "done:3"], True, Exit.DONE),  # told in the last step
        (1, ["start"], True, Exit.FAILED),
        (-15, [], True, Exit.STOPPED),
        (1, [], False, Exit.FAILED),
        (1, ["start", "done:3"], False, Exit.FAILED),
        (1, ["start", "stopped:3"], False, Exit.FAILED),
    ],
)
def test_exit_code(tmp_path: Path, code: int, events: list[str], asked: bool, end: Exit) -> None:
    launch = LocalLaunch(check_recipe(load_recipe("quickstart")), RunDir(tmp_path))
    launch.exit_code, launch.stop.soon = code, asked
    assert launch._decide(history("attempt", *events), may_restart=True).code is end


def test_end_launch_finds_what_left_its_session() -> None:
    code = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True); print(flush=True)"
    env = {**os.environ, LAUNCH_ID: "test-of-end-launch"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.wait()
    assert len(processes_of("test-of-end-launch")) == 1
    assert end_launch("test-of-end-launch", patience_s=0) == set()
    assert processes_of("test-of-end-launch") == set()
