"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Halves on overflow, doubles after `interval` steps without one.

    Args:
        value: the factor of the loss now.
        interval: good steps before it grows.
        good: good steps since the last change.
    """

    value: float
    interval: int = 1000
    good: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> LossScale | None:
        return cls(value=2.0**16) if precision == "fp16" else None

    def update(self, finite: bool) -> None:
        if not finite:
            self.value, self.good = max(1.0, self.value / 2), 0
        else:
            self.good += 1
            if self.good == self.interval:
                self.value, self.good = self.value * 2, 0
