"""A run that is killed at random instants, again and again, ends as one that was left alone.

TPLAUNCH_SOAK_KILLS=100 pytest -s -m faults tests/train/test_soak.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.train.test_torchrun import command, curve, environment, rank_pid, shape
from tplaunch.checkpoint.store import damage, list_checkpoints, read_manifest
from tplaunch.errors import Exit
from tplaunch.files import read_lines
from tplaunch.run.directory import RunDir
from tplaunch.run.heartbeat import read_beats

KILLS = int(os.environ.get("TPLAUNCH_SOAK_KILLS", "10"))  # of a run that trains; those during start-up come on top
SEED = 4
EVERY, AHEAD = 3, 12  # steps between saves; most whole steps that a start lives for
STEPS = 20 * KILLS + 300  # more than lives between kills train, on a quick machine, too
START_UP_S, STEP_S = 6.0, 0.1  # about
SETTINGS = [
    *(*shape(1, 1, 2), f"training.steps={STEPS}", f"checkpoint.every={EVERY}"),
    *("training.seq_len=32", "training.micro_batch_size=2", "training.global_batch_size=4", "model.num_layers=2"),
]
PATIENCE_S = 240.0


def newest_whole(run: RunDir) -> int | None:
    """The step of the newest checkpoint whose every file matches its manifest."""
    for step, path in reversed(list_checkpoints(run.checkpoints)):
        if not damage(path, read_manifest(path)):
            return step
    return None


def saves(run: RunDir) -> set[str]:
    """The saves under way."""
    return {path.name for path in run.checkpoints.glob("step-*.tmp")}


def step_now(run: RunDir, attempt: int) -> int:
    """The step that rank 0 of an attempt is in; 0 before its first."""
    return next((beat.step for beat in read_beats(run.attempt_dir(attempt))), 0)


class Life:
    """One start of the run, and its end.

    Args:
        words, variables: the command and its environment.
        run: its run directory.
    """

    def __init__(self, words: list[str], variables: dict[str, str], run: RunDir) -> None:
        self.run, self.attempt, self.events_before = run, run.last_attempt() + 1, len(read_lines(run.events))
        with (run.root.parent / "said").open("ab") as said:
            self.process = subprocess.Popen(
                words, env=variables, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for_step(self, number: int) -> None:
        """Returns when it has trained so many steps, or has ended."""
        first, deadline = 0, time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            step = step_now(self.run, self.attempt)
            first = first or step
            if step and step >= first + number:
                return
            time.sleep(0.001)

    def kill(self, victim: int | None) -> bool:
        """SIGKILLs a rank, or the launcher's process group; a rank that is not there yet stands for the launcher.

        Returns:
            Whether that was inside a save.
        """
        pid = rank_pid(self.run.root, victim) if victim is not None else None
        before = saves(self.run)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        inside = bool(before & saves(self.run))
        self.process.wait(PATIENCE_S)
        while any(rank_pid(self.run.root, rank) for rank in range(2)):
            time.sleep(0.01)
        return inside

    def resumed_after(self) -> int | None:
        """The step that this life went on from, None if it began with the first or did not get so far."""
        events = read_lines(self.run.events)[self.events_before :]
        assert not [event for event in events if event["event"] == "checkpoint_damaged"]
        return next((event["step"] for event in events if event["event"] == "resume"), None)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(600 + 60 * KILLS)
def test_killed_again_and_again(tmp_path: Path) -> None:
    variables, chance, began = environment(tmp_path / "cache"), random.Random(SEED), time.monotonic()
    whole, run = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    assert Life(command(whole.root, *SETTINGS), variables, whole).process.wait() == Exit.DONE
    alone_s = time.monotonic() - began

    counts: Counter[str] = Counter()
    while counts["while it trains"] < KILLS:
        trains = chance.random() < 0.9
        safe = newest_whole(run)
        life = Life(command(run.root, *SETTINGS), variables, run)
        if trains:
            life.wait_for_step(chance.randrange(AHEAD))
        time.sleep(chance.uniform(0, STEP_S if trains else START_UP_S))
        assert life.process.poll() is None, (tmp_path / "said").read_text()[-3000:]
        counts["of them inside a save"] += life.kill(chance.choice([0, 1, None]))
        counts["while it trains" if trains else "during start-up"] += 1
        resumed = life.resumed_after()
        counts["resumptions"] += resumed is not None
        assert resumed == safe or (resumed is None and not trains)

    safe = newest_whole(run)
    last = Life(command(run.root, *SETTINGS), variables, run)
    assert last.process.wait() == Exit.DONE
    assert last.resumed_after() == safe
    counts["resumptions"] += safe is not None
    seconds = time.monotonic() - began - alone_s
    print(f"\nkills: {dict(counts)}, in {seconds:.0f} s; {STEPS} steps, {alone_s:.0f} s when left alone")
    assert counts["of them inside a save"] > 0
    assert [step for step, _, _ in curve(run.root)] == list(range(1, STEPS + 1))
    assert curve(run.root) == curve(whole.root)
