"""Where the time of steps goes, by the host's clock and by events of a device that runs behind it."""

from __future__ import annotations

import time

import pytest
import torch

from tplaunch.train.clock import PARTS, StepClock


def test_parts_add_up_to_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        for part, seconds in zip(PARTS, (1, 4, 2, 1), strict=True):
            clock.mark(part)
            now += seconds
        clock.mark("")
        now += 5  # between steps: nobody's
    assert clock.take() == dict(zip(PARTS, (2, 8, 4, 2), strict=True))
    assert set(clock.take().values()) == {0.0}


class Event:
    """A stand-in for an event of a GPU: done when the device gets there, which takes 1 s for each."""

    device = host_waited = 0.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.device += 1.0
        self.at = Event.device

    def synchronize(self) -> None:
        Event.host_waited = max(Event.host_waited, self.at)

    def elapsed_time(self, later: Event) -> float:
        assert later.at <= Event.host_waited, "is not done yet: torch would raise"
        return 1e3 * (later.at - self.at)


def test_a_device_is_only_waited_for_when_the_times_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(10):
        for part in PARTS:
            clock.mark(part)
            if part == "update":
                Event.host_waited = Event.device - 1  # the step's own wait, for the loss
        clock.mark("")
    assert Event.host_waited < Event.device
    assert clock.take() == dict.fromkeys(PARTS, 10.0)
    assert Event.host_waited == Event.device
    assert Event.made == 2 * (len(PARTS) + 1), "events are used again"
