"""Loss spikes: a loss far above those before it (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5.1)."""

from __future__ import annotations

import statistics

from tplaunch.recipe.schema import LossSpike


def spike(loss: float, window: list[float], rule: LossSpike) -> float | None:
    """Whether a step's loss is a spike. The window takes the loss in, or begins anew after a spike: a loss that stays
    high is no second one.

    Args:
        loss: of the step.
        window: losses of the steps before; changed.

    Returns:
        The median that the loss is a spike above, or None.
    """
    if len(window) >= rule.window:
        median = statistics.median(window)
        if loss > rule.factor * median:
            window.clear()
            return median
    window[:] = [*window, loss][-rule.window :]
    return None
