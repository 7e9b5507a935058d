"""Ranks that hold the others up. Torch-free."""

from __future__ import annotations

import statistics

RATIO = 1.5


def find_stragglers(own_s: list[float], step_s: float) -> list[tuple[int, float]]:
    """Ranks whose step would take more than 1.5 times the median rank's if none waited for another.

    All ranks end a step together, so a step's length says nothing; what tells them apart is the time before a rank
    first waits for another: to get its data and begin the forward pass. What follows, the slowest rank's forward and
    backward, is taken to be the same for all: a host or a disk that is slow is seen, a slow GPU is not.

    Args:
        own_s: by rank, that time, a mean over some steps.
        step_s: the whole step's, over the same steps.

    Returns:
        (rank, times the median), worst first.
    """
    shared = max(0.0, step_s - max(own_s))
    alone = [own + shared for own in own_s]
    median = statistics.median_low(alone)
    found = [(rank, seconds / median) for rank, seconds in enumerate(alone) if seconds > RATIO * median]
    return sorted(found, key=lambda pair: -pair[1])
