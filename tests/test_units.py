"""Typed strings and back."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tplaunch.units import format_bytes, format_count, format_duration, parse_bytes, parse_count, parse_duration


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
