"""Curves are read, thinned and smoothed without losing what matters."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

from hypothesis import given
from hypothesis import strategies as st

from tests.made_runs import make_run
from tplaunch.report.curves import Curves, running_medians, thin


def test_bad_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", records=5)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "loss": "low"}\n[1, 2]\n{"step": 7, "loss": 1.0, "rank/0": {"a": 1}}\n{"step": 8')
    curves = Curves.of(run)
    assert (curves.bad, curves.last("loss"), len(curves.points("loss"))) == (2, 1.0, 6)
    assert curves.points("rank/0") == [] and curves.points("none") == []


def test_a_step_that_stands_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", records=5)
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n')
    assert dict(Curves.of(run).points("loss"))[3] == 9.0 and len(Curves.of(run).points("loss")) == 5


def test_thinning_keeps_every_spike() -> None:
    rng = random.Random(0)
    points = [(float(x), rng.gauss(2, 0.1)) for x in range(100_000)]
    for at in (17, 40_001, 99_998):
        points[at] = (float(at), 50.0 + at)
    points[60_000] = (60_000.0, -3.0)
    thinned = thin(points, 500)
    assert len(thinned) <= 4 * 501
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert {points[17], points[40_001], points[99_998], points[60_000]} <= set(thinned)
    assert thinned == sorted(thinned) and set(thinned) <= set(points)


def test_thinning_leaves_few_points_and_one_place_alone() -> None:
    few = [(1.0, 2.0), (2.0, 3.0)]
    assert thin(few, 100) == few
    assert thin([(5.0, float(y)) for y in range(1000)], 3)[0] == (5.0, 0.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 30))
def test_running_medians_are_medians_of_what_lies_around(values: list[float], window: int) -> None:
    found = running_medians(values, window)
    for i, value in enumerate(found):
        reach = min(window // 2, i, len(values) - 1 - i)
        assert value == median(values[i - reach : i + reach + 1])


def test_equal_step_and_tokens(tmp_path: Path) -> None:
    curves = Curves.of(make_run(tmp_path / "a", records=10, every=5))
    assert curves.at("loss", 23) == curves.at("loss", 20) != curves.at("loss", 25)
    assert curves.at("loss", 4) is None
    assert curves.at("loss", 20 * 524_288, "tokens") == curves.at("loss", 20)
