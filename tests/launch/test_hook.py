"""The command of `logging.on_event`, as real scripts."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tplaunch.errors import Exit
from tplaunch.launch import hook
from tplaunch.launch.hook import telling
from tplaunch.launch.supervise import Verdict, supervise
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Done, EpochBegan, Saved, SaveFailed, Started

KEEP = "#!/bin/sh\ncat >> {folder}/told\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "a run; touch pwned")
    run.create()
    return run


def script(folder: Path, text: str) -> str:
    path = folder / "bot's script.sh"
    path.write_text(text.format(folder=shlex.quote(str(folder))))
    path.chmod(0o755)
    return shlex.join([str(path), "--channel", "$(touch pwned)"])


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "told").read_text().splitlines()]


def test_each_event_is_told_in_order_with_its_alert(run: RunDir, tmp_path: Path) -> None:
    run.append(Started(1))
    command = script(tmp_path, KEEP)
    verdict = Verdict(Exit.FAILED, "end", "failed: no checkpoint")

    def attempt(number: int) -> None:
        run.append(Saved(3, "checkpoints/step-3", 1.0))
        run.append(SaveFailed(6, "disk full"))

    supervise(run, attempt, lambda history, again: verdict, lambda *_: None, max_restarts=0, on_event=command)
    found = told(tmp_path)
    assert [event["event"] for event in found] == ["attempt", "checkpoint", "checkpoint_failed", "attempt_end"]
    assert {event["run"] for event in found} == {str(run.root)}
    assert found[1]["step"] == 3 and "alert" not in found[1]
    assert found[2]["alert"] == {
        "title": "checkpoint failed",
        "text": "of step 6, training goes on: disk full",
        "level": "ERROR",
    }
    assert found[3]["alert"]["title"] == "run failed"


def test_an_event_is_never_part_of_a_command(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nasty = "'; touch pwned; $(touch pwned) `touch pwned` \n"
    with telling(run, script(tmp_path, KEEP)):
        run.append(SaveFailed(1, nasty))
    assert told(tmp_path)[0]["why"] == nasty
    assert not (tmp_path / "pwned").exists()


def test_a_command_that_hangs_costs_little_and_is_ended(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "COMMAND_S", 0.5)
    monkeypatch.setattr(hook, "FINISH_S", 1.0)
    command = script(tmp_path, "#!/bin/sh\necho $$ >> {folder}/pids\nsleep 60 & wait\n")
    with telling(run, command):
        began = time.monotonic()
        for step in range(200):
            run.append(EpochBegan(step, []))
        assert time.monotonic() - began < 20, "each event waited for the command"
        time.sleep(1.5)
        ending = time.monotonic()
    assert time.monotonic() - ending < 30, "the end waited for the command"
    time.sleep(0.5)
    alive = [pid for pid in (tmp_path / "pids").read_text().split() if Path(f"/proc/{pid}").exists()]
    assert alive == []
    log = run.hook_log.read_text()
    assert "ended after" in log and "events left out" in log


def test_a_command_that_fails_is_noted(run: RunDir, tmp_path: Path) -> None:
    with telling(run, script(tmp_path, "#!/bin/sh\necho no network >&2\nexit 3\n")):
        run.append(Done(5))
    log = run.hook_log.read_text()
    assert "no network" in log and "exit code 3" in log and '"event": "done"' in log
    with telling(run, str(tmp_path / "missing")):
        run.append(Done(5))
    assert "cannot be started" in run.hook_log.read_text()


def test_a_command_that_reads_nothing_is_no_error(run: RunDir, tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"])
    with telling(run, command):
        run.append(SaveFailed(1, "x" * 500_000))
    assert (tmp_path / "ran").read_text() == "x"


def test_the_text_of_a_command_is_checked() -> None:
    from tests.recipes import case
    from tplaunch.check.observe import hook_problems, observe_warnings
    from tplaunch.recipe.schema import Recipe

    def problems(command: str) -> list[str]:
        recipe = Recipe.model_validate({**case(), "logging": {"on_event": command}})
        return [problem.what for found in (hook_problems, observe_warnings) for problem in found(recipe)]

    assert problems("sh -c 'cat > /dev/null'") == []
    assert problems("sh -c 'cat") == ['"sh -c \'cat" is no command']
    assert problems("#") == ["no program # is here; it is started where `train`, or the job, runs"]


def test_nodes_that_an_offline_run_cannot_watch_are_a_warning() -> None:
    from tests.recipes import case
    from tplaunch.check.observe import observe_warnings
    from tplaunch.recipe.schema import Recipe

    def keys(mode: str) -> list[str]:
        wandb = {"system": "every_node", "mode": mode}
        return [found.key for found in observe_warnings(Recipe.model_validate({**case(), "logging": {"wandb": wandb}}))]

    assert keys("auto") == keys("online") == []
    assert keys("offline") == keys("disabled") == ["logging.wandb.system"]
