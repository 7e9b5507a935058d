"""What is measured between two records."""

from __future__ import annotations

import itertools
import time

import pytest

pytest.importorskip("torch")

from tplaunch.train.log import Window


def test_tokens_of_a_growing_batch_are_those_that_were_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # one second a question: a step takes two, one of them to get its data
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    window = Window()
    for tokens in (100, 200, 600):
        window.start()
        window.got_data()
        window.end(tokens)
    assert (window.step_time, window.data_time) == (2.0, 1.0)
    assert window.tokens_per_s == pytest.approx(900 / 6), "not the last step's 600 in every mean step"
