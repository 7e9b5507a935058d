"""The run directory: shared files survive crashes and many writers; one launch holds it at a time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tplaunch.errors import Exit, TplaunchError
from tplaunch.files import append_line, read_lines
from tplaunch.run import directory
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Resumed, Saved, Started

HOLDER = """
import sys, time
from pathlib import Path
from tplaunch.run.directory import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_paths(run: RunDir) -> None:
    assert run.rank_log(2, 5) == run.root / "logs/attempt-2/rank-5.log"
    assert run.rank_error(2, 5) == run.root / "logs/attempt-2/rank-5.error.json"
    assert run.torchrun_log(2) == run.root / "logs/attempt-2/torchrun.log"


def test_every_path_that_it_names_is_used() -> None:
    """One that nothing reads or writes tells readers of a file that is not there."""
    package = Path(directory.__file__).parents[1]
    own = Path(directory.__file__).read_text()
    others = "\n".join(path.read_text() for path in package.rglob("*.py") if path != Path(directory.__file__))
    for name in re.findall(r"def (\w+)\(self.*\) -> Path:", own):
        used = rf"\brun(_dir)?\.{name}\b"
        assert re.search(used, others) or re.search(rf"self\.{name}\b", own), name


def test_create_keeps_what_is_there(run: RunDir) -> None:
    run.append(Started())
    run.create()
    assert [e["event"] for e in read_lines(run.events)] == ["start"]


def test_create_says_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TplaunchError, match="--run-dir") as caught:
        RunDir(tmp_path / "file" / "run").create()
    assert caught.value.code == Exit.USAGE


def test_events_come_back(run: RunDir) -> None:
    assert read_lines(run.events) == []
    run.append(Saved(step=5, path="checkpoints/step-00000005"))
    (event,) = read_lines(run.events)
    assert event.pop("time") > 1e9
    assert event == {"event": "checkpoint", "step": 5, "path": "checkpoints/step-00000005", "seconds": 0.0}


def test_a_torn_line_costs_only_itself(run: RunDir) -> None:
    run.append(Started())
    with run.events.open("ab") as file:
        file.write(b'{"event": "chec')
    assert [e["event"] for e in read_lines(run.events)] == ["start"]
    run.append(Resumed(step=0))
    assert [e["event"] for e in read_lines(run.events)] == ["start", "resume"]


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from tplaunch.run.directory import append_line\n"
        "for i in range(200): append_line(Path(sys.argv[1]), {'who': sys.argv[2], 'i': i, 'pad': 'x' * 3000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, who]) for who in "abc"]
    assert [w.wait(timeout=120) for w in writers] == [0, 0, 0]
    lines = filter(None, path.read_text().splitlines())
    assert sorted((r["who"], r["i"]) for r in map(json.loads, lines)) == [(w, i) for w in "abc" for i in range(200)]


def test_lines_are_strict_json(tmp_path: Path) -> None:
    append_line(tmp_path / "m", {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-4})
    assert "NaN" not in (tmp_path / "m").read_text()
    assert read_lines(tmp_path / "m") == [{"loss": None, "grad_norm": None, "lr": 1e-4}]


def test_no_two_callers_get_one_attempt(run: RunDir) -> None:
    with ThreadPoolExecutor(8) as pool:
        attempts = list(pool.map(lambda _: run.next_attempt(), range(40)))
    assert sorted(attempts) == list(range(1, 41))


def test_attempts_go_on_after_the_highest(run: RunDir) -> None:
    run.attempt_dir(10).mkdir(parents=True)
    (run.logs / "attempt-x").mkdir()
    assert run.next_attempt() == 11


def test_the_second_launch_is_refused_and_told_who(run: RunDir) -> None:
    with run.lock():
        with pytest.raises(TplaunchError, match=f"process {os.getpid()} on .* since") as caught, run.lock():
            pytest.fail("two hold one run directory")
        assert caught.value.code == Exit.USAGE
    with run.lock():
        pass


def test_the_lock_dies_with_its_holder(run: RunDir) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.root], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(TplaunchError, match=f"process {holder.pid} on"), run.lock():
        pytest.fail("two hold one run directory")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run.lock():
        assert json.loads(run.lock_file.read_text())["pid"] == os.getpid()
