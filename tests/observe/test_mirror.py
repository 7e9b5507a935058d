"""When a mirror begins, and that it gets all in order."""

from __future__ import annotations

import threading

import pytest

from tplaunch.observe import mirror
from tplaunch.observe.mirror import Mirror


class Kept(Mirror):
    """Keeps the steps that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.steps = threading.Event(), list[int]()
        self._start("kept")

    def finish(self) -> None:
        self._end(10.0)

    def _mirror(self) -> None:
        self.began.set()
        while (entry := self._next()) is not None:
            self.steps.append(entry.record["step"])


def test_a_mirror_opens_with_the_first_record() -> None:
    kept = Kept()
    assert not kept.began.wait(0.2)
    kept.log({"step": 1})
    assert kept.began.wait(10.0)
    kept.log_texts([{"step": 2, "prompt": "", "text": ""}])
    kept.log({"step": 2})
    kept.finish()
    assert kept.steps == [1, 2, 2]


def test_a_mirror_without_a_record_opens_when_it_is_ended() -> None:
    kept = Kept()
    kept.finish()
    assert kept.began.is_set() and kept.steps == []


def test_a_long_first_step_does_not_keep_a_mirror_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_S", 0.1)
    kept = Kept()
    assert kept.began.wait(10.0)
    kept.finish()
