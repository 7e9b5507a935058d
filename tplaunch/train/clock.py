"""Where the time of steps goes on a rank, part by part, without ever waiting for its device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

PARTS = ("data", "forward and backward", "gradients", "update")


class StepClock:
    """Sums up the seconds between the marks of steps, by the part that began with the mark.

    On a GPU the marks are events in its stream: the parts are those of the device, which runs behind the host. They
    are read a step later, when the host has waited for the device anyway (`TrainStep` does so once a step).

    Args:
        device: this rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._unread: list[tuple[str, torch.cuda.Event]] = []  # of the step before
        self._free: list[torch.cuda.Event] = []

    def mark(self, part: str) -> None:
        """A part of a step begins; "" where the step has ended."""
        if self.device.type == "cuda":
            event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))
        if not part:
            self._end_step()

    def take(self) -> dict[str, float]:
        """Seconds of each of `PARTS` since the last call, which begin anew. Waits for the device."""
        if self._unread:
            self._unread[-1][1].synchronize()
            self._read()
        taken = {part: self.seconds[part] for part in PARTS}
        self.seconds.clear()
        return taken

    def _end_step(self) -> None:
        for (part, since), (_, until) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[part] += until - since
        self._marks.clear()
        self._read()
        self._unread, self._events = self._events, []

    def _read(self) -> None:
        for (part, since), (_, until) in zip(self._unread, self._unread[1:], strict=False):
            self.seconds[part] += since.elapsed_time(until) / 1e3
        self._free += [event for _, event in self._unread]
        self._unread = []
