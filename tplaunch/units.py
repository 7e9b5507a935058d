"""Typed strings: bytes ("80GiB"), durations ("2h"), counts ("1B"); and the way back to text."""

from __future__ import annotations

import re
from decimal import Decimal

MiB = 2**20
GiB = 2**30

_BYTES: dict[str, int | Decimal] = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGTP", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGTP", 1)},
}
_SECONDS: dict[str, int | Decimal] = {"ms": Decimal("0.001"), "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_COUNTS: dict[str, int | Decimal] = {"": 1, "K": 1000, "M": 1000**2, "B": 1000**3, "T": 1000**4}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,3})?)\s*([A-Za-z]*)\s*", re.ASCII)


def _parse(text: str | int | float, table: dict[str, int | Decimal], example: str) -> Decimal:
    """The exact value: 8.03B is 8030000000, though 8.03 * 1e9 is not."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        number, unit = Decimal(text), ""
    else:
        match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} is not a number with a unit, such as {example}")
        number, unit = Decimal(match[1]), match[2]
    if not number.is_finite() or number < 0 or float(number) == float("inf"):
        raise ValueError(f"{text!r} must be finite and not negative")
    by_case = {key.lower(): value for key, value in table.items()}
    scale = table.get(unit, by_case.get(unit.lower()))
    if scale is None:
        if unit == "":
            scale = 1
        else:
            raise ValueError(f"unknown unit {unit!r} in {text!r}: use one of {', '.join(k for k in table if k)}")
    return number * scale


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as "80GiB" or "1.5TB"; a bare number is bytes.

    Raises:
        ValueError: not a size.
    """
    return int(_parse(text, _BYTES, '"80GiB"'))


def parse_duration(text: str | int | float) -> float:
    """Seconds of a duration such as "90s", "10m", "2h", "1d"; a bare number is seconds.

    Raises:
        ValueError: not a duration.
    """
    return float(_parse(text, _SECONDS, '"2h"'))


def parse_count(text: str | int) -> int:
    """A count such as "1B" (10^9) or "300M"; a bare number is itself.

    Raises:
        ValueError: not a whole count.
    """
    value = _parse(text, _COUNTS, '"1B"')
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def format_bytes(count: float) -> str:
    """Bytes as text with a binary unit: 1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def format_count(count: float) -> str:
    """A count as text: 8030261248 -> "8.03B"."""
    for unit in ("", "K", "M", "B", "T"):
        if abs(count) < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.0f}" if unit == "" else f"{count:.2f}{unit}"


def format_duration(seconds: float) -> str:
    """Seconds as text: 3725 -> "1h02m", 75 -> "1m15s", 4.2 -> "4.2s"."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
