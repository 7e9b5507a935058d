"""Numbers that would do, in words, for the fixes that problems name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def multiples(step: int, near: int) -> list[int]:
    """The multiples of `step` just below and just above `near`."""
    below = near // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def choices(options: Iterable[int], near: int) -> str:
    """The options next to a number on either side, in words."""
    options = list(options)
    below = max((option for option in options if option < near), default=None)
    above = min((option for option in options if option > near), default=None)
    return " or ".join(str(option) for option in (below, above) if option is not None)


def nearest(takes: Callable[[int], bool], near: int, limit: int, *, between: bool = False) -> Iterator[int]:
    """The first number below `near` and the first above it, up to `limit`, that `takes` accepts.

    Args:
        between: what is sought lies between `near` and the next number, so that `near` itself is below it.
    """
    for numbers in (range(near if between else near - 1, 0, -1), range(near + 1, limit + 1)):
        found = next(filter(takes, numbers), None)
        if found is not None:
            yield found
