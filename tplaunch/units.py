"""Typed strings: bytes ("80GiB"), durations ("2h"), counts ("1B"); and the way back to text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Literal

MiB = 2**20
GiB = 2**30

_BYTES: dict[str, int | Decimal] = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGTP", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGTP", 1)},
}
_SECONDS: dict[str, int | Decimal] = {"ms": Decimal("0.001"), "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_COUNTS: dict[str, int | Decimal] = {"": 1, "K": 1000, "M": 1000**2, "B": 1000**3, "T": 1000**4}
_ALSO_BINARY = {**_COUNTS, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_SLURM_BYTES: dict[str, int | Decimal] = {
    **{p: 1024**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGTP", 1)},
}
# minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; no part is bounded, as with sbatch.
_SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})", re.ASCII)
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,3})?)\s*([A-Za-z]*)\s*", re.ASCII)
_EXACT = Context(prec=1000)  # digits, of which the usual context keeps 28


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
    return _EXACT.multiply(number, Decimal(scale))


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


def parse_slurm_time(value: object) -> int:
    """Seconds of a Slurm time limit: "24:00:00", "90:00" (minutes), "1-12" (days and hours), or a duration ("2h").

    Rounded up to whole minutes, which is as fine as Slurm's limits are.

    Raises:
        ValueError: not a time limit, or a bare number: sbatch would take it for minutes, a duration for seconds.
    """
    # A number with a point is none of Slurm's formats; resolved recipes have held seconds so.
    if isinstance(value, float):
        return _whole_minutes(parse_duration(value))
    text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if text.isascii() and text.isdigit():
        number = int(text[:12])
        raise ValueError(
            f"{text} is minutes to sbatch ({format_slurm_time(number * 60)}), but seconds where a recipe has other "
            f"durations ({format_slurm_time(_whole_minutes(number))}): write {number}m or {number}s"
        )
    match = _SLURM_TIME.fullmatch(text)
    if match is None:
        if not text[-1:].isalpha():
            raise ValueError(f"{value!r} is no time limit, such as 24:00:00, 1-12:00:00, 90:00 (minutes) or 2h")
        return _whole_minutes(parse_duration(text))
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is None:  # minutes:seconds come before hours:minutes:seconds
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts)
    else:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    return _whole_minutes(int(match["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def _whole_minutes(seconds: float) -> int:
    return math.ceil(seconds / 60) * 60


def format_slurm_time(seconds: int) -> str:
    """Seconds as `scontrol` shows a time limit: 129600 -> "1-12:00:00", 5400 -> "01:30:00"."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def parse_slurm_memory(value: object) -> int:
    """Bytes of a Slurm memory size such as "64G" or "64GiB", both of 2^30; 0 is all memory of a node.

    Rounded up to whole MiB, as Slurm counts.

    Raises:
        ValueError: not a size, or one that sbatch takes for another: a bare number (MiB), or "64GB" (2^30 each).
    """
    # No node has 64 TiB, which so many MiB are: resolved recipes have held bytes so.
    if isinstance(value, int) and value >= 64 * 2**20:
        return -(-value // 2**20) * 2**20
    text = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{value!r} is no size of memory, such as 64G, 1500M or 64GiB")
    unit = match[2].upper()
    if unit == "" and Decimal(match[1]):
        raise ValueError(f"{text} is MiB to sbatch, but bytes where a recipe has other sizes: write {text}M or say GiB")
    if len(unit) == 2 and unit in map(str.upper, _BYTES):
        larger, smaller = f"{match[1]}{unit[0]}", f"1024^{'KMGTP'.index(unit[0]) + 1}"
        raise ValueError(
            f"{text} counts in {smaller} bytes to sbatch, but in {smaller.replace('1024', '1000')} where a recipe has "
            f"other sizes: write {larger}, which is {larger}iB"
        )
    return -(-math.ceil(_parse(text, _SLURM_BYTES, "64G")) // MiB) * MiB


def format_slurm_memory(count: int) -> str:
    """Bytes of whole MiB as `scontrol` shows memory: 64 * 2^30 -> "64G", 1500 * 2^20 -> "1500M", 0 -> "0"."""
    for unit in "TGM":
        size = int(_SLURM_BYTES[unit])
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return "0"


def parse_count(text: str | int) -> int:
    """A count such as "1B" (10^9) or "300M"; a bare number is itself.

    Raises:
        ValueError: not a whole count.
    """
    value = _parse(text, _COUNTS, '"1B"')
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


LengthUnit = Literal["steps", "samples", "tokens", "%"]
_LENGTH = re.compile(r"(.*?[0-9]\s*[A-Za-z]{0,2}?)\s*(steps?|samples?|tokens?|%|)\s*", re.ASCII)


@dataclass(frozen=True)
class Length:
    """A part of a run, or, from its beginning, a place in it.

    Args:
        amount: of the unit; whole, but for a share of the run.
        unit: what is counted.
    """

    amount: int | Decimal
    unit: LengthUnit = "steps"

    def __bool__(self) -> bool:
        return self.amount > 0

    def is_multiple_of(self, other: Length) -> bool:
        """Whether it is a multiple of another length; told of one unit only, else taken to be."""
        return self.unit != other.unit or not other or self.amount % other.amount == 0

    def __str__(self) -> str:
        number = str(self.amount)
        for suffix in "KMBT":
            scaled = Decimal(self.amount) / _COUNTS[suffix]
            if self.unit in ("samples", "tokens") and scaled >= 1 and scaled == round(scaled, 2):
                number = f"{scaled:f}{suffix}"
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"


def parse_length(value: object) -> Length:
    """A part of a run such as "2000 steps", "252B tokens", "4Mi tokens", "4M samples" or "10%"; a bare number is steps.

    Raises:
        ValueError: not a part of a run, not whole where it must be, or more than the whole run.
    """
    if isinstance(value, Length):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        number, word = Decimal(value), "steps"
    else:
        match = _LENGTH.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('a part of a run is such as 2000 (steps), "252B tokens", "4M samples" or "10%"')
        number, word = _parse(match[1], _ALSO_BINARY, '"252B tokens"'), match[2] or "steps"
    if word == "%":
        if number > 100:
            raise ValueError(f"{value!r} is more than the whole run")
        return Length(number, "%")
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number of {word}")
    units: dict[str, LengthUnit] = {"step": "steps", "sample": "samples", "token": "tokens"}
    return Length(int(number), units[word.removesuffix("s")])


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
