"""Pipeline schedules: the orders against torch's own, the clock against the papers' formulas."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tplaunch.plan.schedule import Held, StageCost, predict, run_orders, simulate
from tplaunch.spec.orders import Action, actions_of
from tplaunch.spec.schedules import SCHEDULES as TABLE
from tplaunch.spec.schedules import stage_rank, stages_of

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved1f1b", 2),
    ("interleaved1f1b", 3),
    ("interleavedzerobubble", 2),
    ("zbvzerobubble", 2),
    ("dualpipev", 2),
]
SIZES = [(pp, m) for pp in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 40)]


class _Stage:
    """As much of a torch pipeline stage as building an order reads."""

    is_first, is_last, has_backward = True, False, False
    group_rank = 0
    submod: Any = None
    device: Any = None
    group: Any = None

    def __init__(self, index: int, num_stages: int, pp: int) -> None:
        self.stage_index, self.num_stages, self.group_size = index, num_stages, pp
        self.stage_index_to_group_rank: dict[int, int] = {}


def _torch_orders(schedule: str, pp: int, virtual_stages: int, microbatches: int) -> list[list[Action]]:
    from torch.distributed.pipelining import schedules as torch_schedules

    letters = {
        torch_schedules.FORWARD: "F",
        torch_schedules.FULL_BACKWARD: "B",
        torch_schedules.BACKWARD_INPUT: "I",
        torch_schedules.BACKWARD_WEIGHT: "W",
    }

    def flat(action: Any) -> Iterator[Action]:
        if action is not None and action.sub_actions:
            for part in action.sub_actions:
                yield from flat(part)
        elif action is not None and action.computation_type in letters:
            yield Action(letters[action.computation_type], action.stage_index, action.microbatch_index)

    kind = torch_schedules.get_schedule_class(schedule)
    if schedule in ("gpipe", "1f1b"):
        table = kind(_Stage(0, pp, pp), microbatches)._get_pipeline_order()
    else:
        stages = [_Stage(chunk * pp, pp * virtual_stages, pp) for chunk in range(virtual_stages)]
        table = kind(stages, microbatches).pipeline_order
    orders = [[part for action in table[rank] for part in flat(action)] for rank in range(pp)]
    if schedule == "1f1b":  # torch's table (not its run) numbers the last rank's forwards from 1
        orders[-1] = [a._replace(microbatch=a.microbatch - 1) if a.kind == "F" else a for a in orders[-1]]
    return orders


@pytest.mark.parametrize(("schedule", "virtual_stages"), SCHEDULES)
def test_orders_are_torchs(schedule: str, virtual_stages: int) -> None:
    compared = refused = 0
    for pp, m in SIZES:
        try:
            expected = _torch_orders(schedule, pp, virtual_stages, m)
        except ValueError:
            refused += 1
            assert TABLE[schedule].why_not(pp, virtual_stages, m), f"torch refuses pp={pp} m={m}"
            continue
        compared += 1
        assert [actions_of(schedule, rank, pp, virtual_stages, m) for rank in range(pp)] == expected, f"{pp=} {m=}"
    assert compared >= 20
    assert compared + refused == len(SIZES)


@pytest.mark.parametrize(("schedule", "virtual_stages"), SCHEDULES)
def test_every_microbatch_passes_every_stage_once(schedule: str, virtual_stages: int) -> None:
    for pp, m in SIZES:
        if TABLE[schedule].why_not(pp, virtual_stages, m):
            continue
        for rank in range(pp):
            actions = actions_of(schedule, rank, pp, virtual_stages, m)
            passes = {(s, i) for s in stages_of(rank, pp, virtual_stages, schedule) for i in range(m)}
            assert {(a.stage, a.microbatch) for a in actions if a.kind == "F"} == passes
            assert sorted((a.stage, a.microbatch) for a in actions if a.kind in "BW") == sorted(passes)
            assert sorted((a.stage, a.microbatch) for a in actions if a.kind in "BI") == sorted(passes)
            assert all(stage_rank(a.stage, pp, schedule) == rank for a in actions)


def _cost(virtual_stages: int, forward: float = 1.0, inputs: float = 1.0, weights: float = 1.0) -> StageCost:
    return StageCost(forward / virtual_stages, inputs / virtual_stages, weights / virtual_stages, held=1.0)


def _analytic_seconds(schedule: str, p: int, v: int, m: int, f: float, i: float, w: float) -> float:
    """Seconds of a step with equal stages, f, i, w the passes of a microbatch through all stages of one rank.

    GPipe and 1F1B (p-1)(f+i+w) of bubble, interleaved 1/v of it (arXiv 2104.04473 §2.2), ZB-H1 (p-1)(f+i-w) (arXiv
    2401.10241 table 1; interleaved 1/v of it), ZB-V and DualPipeV none on a rank itself: what is left is the wait of
    the last rank for its first microbatch, (p-1) f/2.
    """
    work = m * (f + i + w)
    if schedule in ("gpipe", "1f1b"):
        return work + (p - 1) * (f + i + w)
    if schedule == "interleaved1f1b":
        return work + (p - 1) * (f + i + w) / v
    if schedule == "interleavedzerobubble":
        return work + (p - 1) * (f + i - w) / v
    return work + (p - 1) * f / 2


@pytest.mark.parametrize(("schedule", "virtual_stages"), SCHEDULES)
def test_bubble_equals_the_papers_formula(schedule: str, virtual_stages: int) -> None:
    v_shaped = schedule in ("zbvzerobubble", "dualpipev")
    costs = [(1.0, 1.0, 1.0)] if v_shaped else [(1.0, 1.0, 1.0), (1.0, 1.25, 0.75), (2.0, 1.5, 1.5)]
    for p in (2, 4, 8, 16, 32, 64):
        for m in (p, 2 * p, 8 * p):
            if TABLE[schedule].why_not(p, virtual_stages, m) or (v_shaped and m < 2 * p):
                continue
            for f, i, w in costs if p < 16 else costs[:1]:
                stages = [_cost(virtual_stages, f, i, w)] * (p * virtual_stages)
                step = predict(schedule, p, virtual_stages, m, stages)
                seconds = _analytic_seconds(schedule, p, virtual_stages, m, f, i, w)
                assert step.seconds == pytest.approx(seconds, rel=1e-9), f"{p=} {m=} {f=} {i=} {w=}"
                assert step.bubble == pytest.approx(1 - m * (f + i + w) / seconds, abs=1e-9)


def test_1f1b_holds_p_minus_r_microbatches_and_gpipe_all() -> None:
    for p, m in ((2, 8), (4, 8), (8, 32)):
        assert predict("1f1b", p, 1, m, [_cost(1)] * p).in_flight == [p - r for r in range(p)]
        assert predict("gpipe", p, 1, m, [_cost(1)] * p).in_flight == [m] * p
        # Interleaved: 2 (p-r-1) + (v-1) p + 1 passes (Korthikanti et al. 2022, section 4.2.3, at r = 0).
        expected = [2 * (p - r - 1) + p + 1 for r in range(p)]
        assert predict("interleaved1f1b", p, 2, m, [_cost(2)] * 2 * p).in_flight == expected


def test_bytes_in_flight_follow_each_stages_own_size() -> None:
    costs = [StageCost(1, 1, 1, held=10.0), StageCost(1, 1, 1, held=3.0)]
    assert predict("1f1b", 2, 1, 4, costs).whole == [Held(20.0), Held(3.0)]
    # In a V, rank 0 holds the first stage and the last.
    v_costs = [StageCost(1, 1, 1, held=b) for b in (1.0, 10.0, 100.0, 1000.0)]
    held = [each.activations for each in predict("zbvzerobubble", 2, 2, 8, v_costs).whole]
    assert held[0] % 1 == 0
    assert held[0] >= 1000.0 + 1.0
    assert held[1] <= 4 * 110.0


@pytest.mark.parametrize(("schedule", "virtual_stages"), SCHEDULES)
def test_long_steps_predicted_from_short_ones(schedule: str, virtual_stages: int) -> None:
    for pp, m, delay in ((4, 600, 0.1), (16, 160, 0.05), (8, 400, 0.2)):
        if TABLE[schedule].why_not(pp, virtual_stages, m):
            continue
        source = random.Random(pp)
        draw = [
            StageCost(*(source.uniform(0.85, 1.15) for _ in range(3)), held=1.0) for _ in range(pp * virtual_stages)
        ]
        whole = simulate(schedule, pp, virtual_stages, m, draw, lambda a, b, delay=delay: delay).step
        short = predict(schedule, pp, virtual_stages, m, draw, lambda a, b, delay=delay: delay)
        assert short.seconds == pytest.approx(whole.seconds, rel=0.03)
        assert short.in_flight == whole.in_flight
        assert short.busy == pytest.approx(whole.busy)


def test_slots_never_overlap_and_wait_for_what_they_need() -> None:
    source = random.Random(0)
    costs = [StageCost(*(source.uniform(0.5, 2.0) for _ in range(3))) for _ in range(8)]
    for schedule in ("interleaved1f1b", "interleavedzerobubble", "zbvzerobubble", "dualpipev"):
        timeline = simulate(schedule, 4, 2, 8, costs, lambda a, b: 0.25)
        end = {slot.action: slot.end for slots in timeline.slots for slot in slots}
        for slots in timeline.slots:
            assert all(a.end <= b.start + 1e-12 for a, b in pairwise(slots))
            for (kind, stage, m), start, _ in slots:
                if kind == "F" and stage:
                    apart = stage_rank(stage, 4, schedule) != stage_rank(stage - 1, 4, schedule)
                    assert start >= end[Action("F", stage - 1, m)] + 0.25 * apart - 1e-12
                if kind == "W":
                    assert start >= end[Action("I", stage, m)] - 1e-12
        assert timeline.step.seconds == pytest.approx(max(end.values()))


def test_orders_that_wait_for_one_another_are_found() -> None:
    orders = [actions_of("1f1b", rank, 2, 1, 4) for rank in range(2)]
    orders[0].insert(0, orders[0].pop(2))  # rank 0 now wants microbatch 0's gradient before it sends it forward
    with pytest.raises(ValueError, match="deadlock: pipeline rank"):
        run_orders(orders, "1f1b", [_cost(1)] * 2)
