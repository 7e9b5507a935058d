"""Stopping on request: a signal sets a flag, and the ranks agree on it at the end of a step."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM, SIGINT or SIGUSR1 (Slurm's warning before a limit).

    Each may come more than once: torchrun and Slurm both send SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = False
        self.by: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.by = self.by or signal.Signals(number).name
