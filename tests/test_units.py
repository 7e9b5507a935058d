"""Typed strings and back."""

from __future__ import annotations

import contextlib
import math
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tplaunch.units import (
    Length,
    format_bytes,
    format_count,
    format_duration,
    format_slurm_memory,
    format_slurm_time,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_length,
    parse_slurm_memory,
    parse_slurm_time,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 1024**3),
        ("1.5TB", 1_500_000_000_000),
        ("1 kib", 1024),
        ("12", 12),
        (" 3 B ", 3),
        ("1e3MB", 10**9),
        (7, 7),
    ],
)
def test_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("10min", 600), ("2h", 7200), ("1d", 86400), ("250ms", 0.25), (3.5, 3.5)],
)
def test_duration(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("1B", 10**9), ("300M", 3 * 10**8), ("1.5k", 1500), ("2T", 2 * 10**12), (5, 5)]
)
def test_count(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "x", "GiB", "-1GiB", "1 2", "1GiB2", "nan", "inf", "1e999", "0x10", "\u0661GiB", "1,5GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_unknown_units_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown unit 'XB' in '3XB': use one of B, KB,.* TiB"):
        parse_bytes("3XB")


def test_a_count_is_whole() -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        parse_count("1.5")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_bytes(text) >= 0


@given(st.integers(0, 10**18))
def test_formatted_bytes_are_close(count: int) -> None:
    assert math.isclose(parse_bytes(format_bytes(count)), count, rel_tol=0.01, abs_tol=1)


@given(st.integers(0, 10**15))
def test_formatted_counts_are_close(count: int) -> None:
    assert math.isclose(parse_count(format_count(count)), count, rel_tol=0.01)


@given(st.integers(0, 10**6))
def test_decimals_are_exact(thousandths: int) -> None:
    assert parse_count(f"{thousandths / 1000:.3f}B") == thousandths * 10**6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4.2s"), (9.96, "10.0s"), (75, "1m15s"), (59.7, "1m00s"), (3725, "1h02m"), (90000, "1d01h"), (0, "0.0s")],
)
def test_formatted_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# What was asked, and what `scontrol show job` of Slurm 22.05 said; tests/slurm/test_cluster.py asks it again.
SLURM_TIMES = {
    "4:00": "00:04:00",
    "0:30": "00:01:00",
    "90:00": "01:30:00",
    "24:00:00": "1-00:00:00",
    "1:75:00": "02:15:00",
    "1-12": "1-12:00:00",
    "1-12:30": "1-12:30:00",
    "1-12:30:15": "1-12:31:00",
}
SLURM_SIZES = {"64G": "64G", "64g": "64G", "3000M": "3000M", "1024M": "1G", "1500K": "2M", "1T": "1T", "0": "0"}


@pytest.mark.parametrize("text", SLURM_TIMES)
def test_a_time_limit_is_what_it_is_to_slurm(text: str) -> None:
    assert format_slurm_time(parse_slurm_time(text)) == SLURM_TIMES[text]


@pytest.mark.parametrize("text", SLURM_SIZES)
def test_memory_is_what_it_is_to_slurm(text: str) -> None:
    assert format_slurm_memory(parse_slurm_memory(text)) == SLURM_SIZES[text]


@pytest.mark.parametrize(
    ("text", "shown"), [("2h", "02:00:00"), ("1d", "1-00:00:00"), ("90s", "00:02:00"), ("1.5h", "01:30:00")]
)
def test_durations_are_time_limits_too(text: str, shown: str) -> None:
    assert format_slurm_time(parse_slurm_time(text)) == shown


@pytest.mark.parametrize(("text", "shown"), [("64GiB", "64G"), ("1.5TiB", "1536G"), ("1.5G", "1536M")])
def test_sizes_of_a_recipe_are_memory_too(text: str, shown: str) -> None:
    assert format_slurm_memory(parse_slurm_memory(text)) == shown


def test_what_resolved_recipes_of_older_runs_hold_is_read() -> None:
    assert format_slurm_time(parse_slurm_time(7200.0)) == "02:00:00"
    assert format_slurm_memory(parse_slurm_memory(64 * 2**30)) == "64G"


@pytest.mark.parametrize("value", [30, "30", 86400, " 30 ", 0])
def test_a_bare_time_limit_is_refused_with_both_meanings(value: int | str) -> None:
    number = int(value)
    minutes, seconds = format_slurm_time(60 * number), format_slurm_time(-(-number // 60) * 60)
    with pytest.raises(
        ValueError, match=rf"minutes to sbatch \({minutes}\), but seconds .* \({seconds}\): write {number}m"
    ):
        parse_slurm_time(value)


@pytest.mark.parametrize(("value", "fix"), [(65536, "65536M"), ("65536", "65536M"), ("64GB", "64G"), ("1.5tb", "1.5T")])
def test_memory_of_two_meanings_is_refused(value: int | str, fix: str) -> None:
    with pytest.raises(ValueError, match=f"to sbatch, but .*: write {fix}"):
        parse_slurm_memory(value)


@pytest.mark.parametrize("value", ["", "x", "1-", "-1", "1:2:3:4", "1-2:3:4:5", "24:00h", "\u0661:00", True, None, []])
def test_what_is_no_time_limit(value: object) -> None:
    with pytest.raises(ValueError):
        parse_slurm_time(value)


@pytest.mark.parametrize("value", ["", "x", "-1G", "1G2", "1P", "\u0661G", True, None, []])
def test_what_is_no_memory(value: object) -> None:
    with pytest.raises(ValueError):
        parse_slurm_memory(value)


@given(st.text(max_size=12) | st.integers() | st.floats())
@example(10**34 + 56369247231644950069249)  # of more digits than a Decimal usually has
def test_any_value_is_slurms_or_a_value_error(value: object) -> None:
    for parse, show in ((parse_slurm_time, format_slurm_time), (parse_slurm_memory, format_slurm_memory)):
        with contextlib.suppress(ValueError):
            assert parse(show(parse(value))) == parse(value)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_what_slurm_shows_is_read_back(minutes: int, mebibytes: int) -> None:
    assert parse_slurm_time(format_slurm_time(60 * minutes)) == 60 * minutes
    assert parse_slurm_memory(format_slurm_memory(mebibytes * 2**20)) == mebibytes * 2**20


@pytest.mark.parametrize(
    ("value", "amount", "unit", "text"),
    [
        (2000, 2000, "steps", "2000 steps"),
        ("1 step", 1, "steps", "1 steps"),
        ("1K", 1000, "steps", "1000 steps"),
        ("252B tokens", 252 * 10**9, "tokens", "252B tokens"),
        ("2.87T tokens", 2_870_000_000_000, "tokens", "2.87T tokens"),
        ("4Mi tokens", 2**22, "tokens", "4194304 tokens"),
        (" 4M samples ", 4_000_000, "samples", "4M samples"),
        ("2.5 %", Decimal("2.5"), "%", "2.5%"),
    ],
)
def test_lengths(value: int | str, amount: int | Decimal, unit: str, text: str) -> None:
    length = parse_length(value)
    assert (length.amount, length.unit, str(length)) == (amount, unit, text)
    assert parse_length(str(length)) == length == parse_length(length)


@pytest.mark.parametrize(
    "value", [True, 1.5, None, "", "10 apples", "1.5 steps", "-3", "100.1%", "3 %%", "tokens", "1KB"]
)
def test_what_is_no_length(value: object) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_length(value)


def test_multiples_of_lengths_are_told_within_a_unit() -> None:
    assert Length(6).is_multiple_of(Length(3)) and not Length(7).is_multiple_of(Length(3))
    assert Length(7).is_multiple_of(Length(3, "tokens")) and Length(7).is_multiple_of(Length(0))
