"""Loss spikes: a loss far above those before it (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5.1)."""

from __future__ import annotations

import statistics

from tplaunch.recipe.schema import LossSpike


def find_spike(loss: float, window: list[float], rule: LossSpike) -> tuple[float | None, list[float]]:
    """Tell whether a step's loss is a spike.

    Args:
        loss: of the step.
        window: losses of the steps before.

    Returns:
        The median that the loss is a spike above, or None; and the window for the next step: with this loss, or empty
        after a spike, since a loss that stays high is no second one.
    """
    if len(window) >= rule.window:
        median = statistics.median(window)
        if loss > rule.factor * median:
            return median, []
    return None, [*window, loss][-rule.window :]
