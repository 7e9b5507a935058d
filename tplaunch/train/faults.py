"""Faults on purpose, to show that a run survives them: `TPLAUNCH_FAULT="rank=1,step=7,kind=sigkill"`.

The fault happens once in a run: the file `fault-injected` in the run directory keeps it from coming again after a
restart. `disk_full` and `kill_during_save` happen in the first save at the step or later, the others at the start
of the step.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tplaunch.checkpoint.store import list_checkpoints
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Fault

VARIABLE = "TPLAUNCH_FAULT"
SLOW_S = 3.0
_SIGNALS = {
    "sigkill": signal.SIGKILL,
    "segv": signal.SIGSEGV,
    "hang": signal.SIGSTOP,
    "sigterm": signal.SIGTERM,
}
IN_STEP = (*_SIGNALS, "exception", "nan", "oom", "slow", "corrupt_checkpoint")
IN_SAVE = ("disk_full", "kill_during_save")


@dataclass(frozen=True)
class PlannedFault:
    """What goes wrong, on which rank, and when (steps count from 1)."""

    rank: int
    step: int
    kind: str

    @classmethod
    def parse(cls, text: str, world_size: int) -> PlannedFault:
        """Read `rank=R,step=S,kind=K`, each exactly once, in any order.

        Raises:
            TplaunchError: it is anything else.
        """
        pairs = [word.strip().split("=", 1) for word in text.split(",")]
        values = {pair[0]: pair[-1] for pair in pairs}
        kinds, why = (*IN_STEP, *IN_SAVE), ""
        if len(pairs) != 3 or set(values) != {"rank", "step", "kind"} or any(len(pair) != 2 for pair in pairs):
            why = "it takes rank, step and kind, each once"
        elif not (values["rank"].isdecimal() and int(values["rank"]) < world_size):
            why = f"the rank is a number below {world_size}"
        elif not (values["step"].isdecimal() and int(values["step"]) > 0):
            why = "steps are numbers from 1"
        elif values["kind"] not in kinds:
            why = f"the kinds are {', '.join(kinds)}"
        if why:
            example = f'{VARIABLE}="rank=0,step=7,kind=sigkill"'
            raise TplaunchError(Problem(f"{VARIABLE}={text!r}", why, f"such as {example}"), code=Exit.FAILED)
        return cls(int(values["rank"]), int(values["step"]), values["kind"])


class FaultInjector:
    """Makes a fault happen on the rank that it names; without one, does nothing.

    Args:
        fault: None: there is none.
        rank: this rank.
        device: where `oom` asks for memory.
    """

    def __init__(self, fault: PlannedFault | None, rank: int, run_dir: RunDir, device: torch.device) -> None:
        self.fault = fault if fault is not None and fault.rank == rank else None
        self.run_dir, self.device = run_dir, device

    @classmethod
    def from_environment(cls, rank: int, world_size: int, run_dir: RunDir, device: torch.device) -> FaultInjector:
        text = os.environ.get(VARIABLE)
        return cls(PlannedFault.parse(text, world_size) if text else None, rank, run_dir, device)

    def at_step(self, step: int) -> float:
        """Called at the start of a step.

        Returns:
            A factor for the loss: 1, or NaN.

        Raises:
            RuntimeError, torch.OutOfMemoryError: the kinds `exception` and `oom` (on the CPU a RuntimeError, too).
        """
        kind = self._now(IN_STEP, step)
        if kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[kind])
        elif kind == "exception":
            raise RuntimeError(f"injected by {VARIABLE}")
        elif kind == "oom":
            torch.empty(2**50, dtype=torch.uint8, device=self.device)
        elif kind == "slow":
            time.sleep(SLOW_S)
        elif kind == "corrupt_checkpoint":
            _flip_a_byte(list_checkpoints(self.run_dir.checkpoints)[-1][1])
            os.kill(os.getpid(), signal.SIGKILL)
        return math.nan if kind == "nan" else 1.0

    def in_save(self, step: int) -> None:
        """Called when this rank has written its files of a checkpoint, before they are complete.

        Raises:
            OSError: the kind `disk_full`.
        """
        kind = self._now(IN_SAVE, step)
        if kind == "disk_full":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected by {VARIABLE})")
        if kind == "kill_during_save":
            os.kill(os.getpid(), signal.SIGKILL)

    def _now(self, kinds: tuple[str, ...], step: int) -> str:
        """The fault's kind if it is one of these and due, else ""; says so in the event log."""
        fault = self.fault
        if fault is None or fault.kind not in kinds or step < fault.step or self.run_dir.fault_marker.exists():
            return ""
        self.run_dir.fault_marker.touch()
        self.run_dir.append(Fault(fault.kind, step, rank=fault.rank, injected=True))
        return fault.kind


def _flip_a_byte(checkpoint: Path) -> None:
    """Flip the bits of the middle byte of a checkpoint's largest file, as a failing disk might."""
    path = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))
