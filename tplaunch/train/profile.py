"""A profile of some steps of a rank: torch's trace, and on a GPU what its memory held.

The recipe names the steps (`logging.profile`), and SIGUSR2 asks for those that come next.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

import torch

from tplaunch.recipe.schema import Profile
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Profiled, ProfileFailed
from tplaunch.torch_private import record_memory, write_memory

if TYPE_CHECKING:
    from torch.profiler import profile

ASKED_STEPS = 2  # that a signal asks for, where the recipe names none
NEVER = sys.maxsize


class StepProfile:
    """Profiles the steps of this rank that are asked for. A step costs the comparison with `due`.

    Args:
        asked: what the recipe asks for.
        run_dir: the run's directory.
        device: whose work is traced, beside the CPU's.
        rank: this one.
    """

    def __init__(self, asked: Profile, run_dir: RunDir, device: torch.device, rank: int) -> None:
        self.run_dir, self.rank, self.cuda = run_dir, rank, device.type == "cuda"
        self.listed = rank in asked.ranks
        self.first, self.last = asked.steps if asked.steps and self.listed else (NEVER, NEVER)
        self.length = asked.steps[1] - asked.steps[0] + 1 if asked.steps else ASKED_STEPS
        self.due = self.first  # the step before which `turn` has something to do, or one before that
        self._signalled = False
        self._running: tuple[profile, int] | None = None  # and its first step

    def listen(self) -> None:
        """Let SIGUSR2 ask this rank, if it is one of the recipe's, for a profile. The others ignore the signal."""
        signal.signal(signal.SIGUSR2, self._note if self.listed else signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if self._running is None:
            self.due = 0

    def turn(self, step: int) -> None:
        """Before a step, end the profile that it is no longer part of, and begin the one that it is the first of.

        Training goes on where that fails; an event says so.
        """
        self.end(step - 1)
        self.due = self.first if step < self.first else NEVER
        if self._signalled:
            last = step + self.length - 1
        elif self.first <= step <= self.last:
            last = self.last
        else:
            return
        self._signalled = False
        try:
            self._begin(step)
            self.due = last + 1
        except (RuntimeError, OSError) as error:
            self._fail(error)

    def end(self, step: int) -> None:
        """After a step, write the profile that runs, if any."""
        if self._running is None:
            return
        running, first = self._running
        self._running = None
        try:
            running.stop()
            name = f"step-{first:08}-to-{step:08}-rank-{self.rank}"
            self.run_dir.profile.mkdir(exist_ok=True)
            trace, memory = self.run_dir.profile / f"{name}.json.gz", self.run_dir.profile / f"{name}.memory.pickle"
            unready = self.run_dir.profile / f".{name}.json.gz"  # nobody opens half a trace
            if self.cuda:
                write_memory(str(memory))
            running.export_chrome_trace(str(unready))
            os.replace(unready, trace)
            self.run_dir.append(Profiled(first, step, self.rank, str(trace), str(memory) if self.cuda else None))
        except (RuntimeError, OSError) as error:
            self._fail(error)

    def _begin(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        running = profile(activities=activities, record_shapes=True)
        if self.cuda:
            record_memory()
        running.start()
        self._running = running, step

    def _fail(self, error: Exception) -> None:
        self.due = NEVER
        self.run_dir.append(ProfileFailed(self.rank, f"{type(error).__name__}: {error}"[:500]))
