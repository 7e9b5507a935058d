"""The loss scale halves, grows and stays at 1 or more."""

from __future__ import annotations

from tplaunch.optim.loss_scale import LossScale


def test_only_fp16_needs_one() -> None:
    found = {precision: LossScale.for_precision(precision) for precision in ("fp64", "fp32", "bf16", "fp16")}
    fp16 = found.pop("fp16")
    assert fp16 is not None and fp16.value == 65536.0
    assert set(found.values()) == {None}


def test_an_overflow_halves_it_and_good_steps_in_a_row_double_it() -> None:
    scale = LossScale(value=8.0, interval=3)
    values = []
    for finite in (True, True, False, True, True, True, True, True, True, False):
        scale.update(finite)
        values.append(scale.value)
    assert values == [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 8.0]


def test_it_never_falls_below_one() -> None:
    scale = LossScale(value=4.0)
    for _ in range(20):
        scale.update(False)
    assert scale.value == 1.0


def test_it_waits_a_thousand_steps() -> None:
    scale = LossScale(value=2.0)
    for _ in range(999):
        scale.update(True)
    assert scale.value == 2.0
    scale.update(True)
    assert scale.value == 4.0
