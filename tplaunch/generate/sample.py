"""The next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2019, arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def pick(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """One token.

    Args:
        logits: [vocab], any device and float type.
        random: on the CPU, so that a seed means the same on every device.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, tokens = (logits.float().cpu() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        scores, tokens = scores[: sampling.top_k], tokens[: sampling.top_k]
    probabilities = scores.softmax(0)
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p  # what the likelier ones reach together
    kept[0] = True
    probabilities = probabilities.where(kept, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=random)])
