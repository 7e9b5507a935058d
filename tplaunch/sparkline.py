"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEVELS = "▁▂▃▄▅▆▇█"
_BAD = "\u00d7"  # a multiplication sign


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Values from left to right, lowest to highest as bars of eight heights; of more than `width`, means of neighbours.

    Args:
        values: None, or a number that is not finite, is shown as a cross, with whatever shares its place.
        width: most characters.
    """
    count = min(width, len(values))
    places = [values[n * len(values) // count : (n + 1) * len(values) // count] for n in range(count)]
    means = [_mean(place) for place in places]
    known = [mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low

    def character(mean: float | None) -> str:
        if mean is None:
            return _BAD
        return _LEVELS[round((mean - low) / span * (len(_LEVELS) - 1)) if span > 0 else 0]

    return "".join(map(character, means))


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if len(finite) == len(values) else None
