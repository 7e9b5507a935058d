"""The learning rate by hand, at each turn of each schedule. Whole runs of it: `tests/train/test_oracle.py`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, resolved
from tplaunch.spec.course import Course


def rates(steps: int, *, until: int | None = None, **schedule: Any) -> list[float]:
    raw = {**case(training={"steps": steps}, optimizer={"lr": 1.0}), "lr_schedule": schedule}
    course = Course(resolved(raw))
    return [course.lr(step) for step in range(1, (until or steps) + 1)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"decay": "constant"}, [1.0] * 10),
        ({"decay": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, *[1.0] * 7]),
        ({"decay": "linear", "warmup_steps": 2}, [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ({"decay": "linear", "decay_steps": 4, "min_lr": 0.2}, [*[1.0] * 6, 0.8, 0.6, 0.4, 0.2]),
        ({"decay": "cosine", "decay_steps": 2, "min_lr": 0.5}, [*[1.0] * 8, 0.75, 0.5]),
        ({"decay": "wsd", "min_lr": 0.5}, [*[1.0] * 9, 0.5]),
        ({"decay": "wsd", "decay_steps": 2}, [*[1.0] * 8, 0.5, 0.0]),
        ({"decay": "cosine", "warmup_steps": 10, "min_lr": 0.5}, [step / 10 for step in range(1, 11)]),
    ],
    ids=str,
)
def test_rates_by_hand(schedule: dict[str, Any], expected: list[float]) -> None:
    assert rates(10, **schedule) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_wsd_decays_over_a_tenth() -> None:
    assert rates(40, decay="wsd")[35:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates(5, decay="wsd") == [1.0, 1.0, 1.0, 1.0, 0.0]  # one step at least


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_stays_where_the_run_ends(decay: str, warmup: int) -> None:
    """`bench` takes more steps than a short recipe has."""
    assert rates(10, until=14, decay=decay, warmup_steps=warmup, min_lr=0.25)[10:] == [0.25] * 4
