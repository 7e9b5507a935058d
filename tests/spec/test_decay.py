"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.recipes import case
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course

STEPS, PEAK, LOW = 1000, 1e-3, 1e-4


def rates(**schedule: Any) -> list[float]:
    raw = {**case(training={"steps": STEPS}, optimizer={"lr": PEAK})}
    raw["lr_schedule"] = {"warmup_steps": 100, "min_lr": LOW, **schedule}
    course = Course(Recipe.model_validate(raw))
    return [course.lr(step) for step in range(1, STEPS + 1)]


def test_cosine_without_a_length_begins_after_the_warmup() -> None:
    rate = rates(decay="cosine")
    assert rate[49] == pytest.approx(PEAK / 2) and rate[99] == PEAK
    assert rate[549] == pytest.approx((PEAK + LOW) / 2) and rate[-1] == pytest.approx(LOW)


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_decay_steps_are_the_last_steps_of_the_run(decay: str) -> None:
    rate = rates(decay=decay, decay_steps=200)
    assert rate[100] == rate[799] == PEAK
    half = (1 + math.cos(math.pi / 2)) / 2
    assert rate[899] == pytest.approx(LOW + (PEAK - LOW) * half) and rate[-1] == pytest.approx(LOW)


def test_wsd_decays_over_the_last_tenth_and_constant_never() -> None:
    assert rates(decay="wsd")[899] == PEAK and rates(decay="wsd")[900] < PEAK
    assert set(rates(decay="constant")[99:]) == {PEAK}
