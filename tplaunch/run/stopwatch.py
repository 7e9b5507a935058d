"""Where the time of a start goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Laps since it was made, by name.

    Attributes:
        laps: seconds of each part, in order; a part that comes again is added up.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """End a part: the time since the last call, or since the stopwatch was made, was its."""
        now = time.perf_counter()
        self.laps[part] = self.laps.get(part, 0.0) + now - self._since
        self._since = now
