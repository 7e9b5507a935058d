"""The next tokens from their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: by these in the order of transformers, which is that of the arguments but for the first.

    Args:
        temperature: what logits are divided by, after the penalty; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2019, arXiv 1904.09751).
        min_p: only tokens at least so likely as this part of the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
        repetition_penalty: what a positive logit of a token that is there already, in the prompt too, is divided by,
            and a negative one multiplied with (Keskar et al. 2019, arXiv 1909.05858).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def pick(logits: Tensor, sampling: Sampling, randoms: Sequence[torch.Generator], seen: Sequence[Tensor] = ()) -> Tensor:
    """A token of each sequence, whatever the others are.

    Args:
        logits: [sequences, vocab], any device and float type.
        randoms: one a sequence, on the CPU, so that a seed means the same on every device.
        seen: bool [vocab] of each, the tokens that are there already; read where there is a penalty.

    Returns:
        int64 [sequences].
    """
    scores = logits.float()
    penalty = sampling.repetition_penalty
    if penalty != 1.0:
        again = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(torch.stack(tuple(seen)), again, scores)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    scores, tokens = scores / sampling.temperature, None
    if sampling.top_k:
        scores, tokens = scores.topk(min(sampling.top_k, scores.shape[-1]))
    elif sampling.top_p < 1:
        scores, tokens = scores.sort(descending=True, stable=True)
    probabilities = scores.double().softmax(-1)
    if sampling.top_p < 1:
        kept = probabilities.cumsum(-1) - probabilities < sampling.top_p  # what the likelier ones reach together
        kept[:, 0] = True
        probabilities = probabilities.where(kept, 0.0)
    if sampling.min_p:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= least, 0.0)
    reached = probabilities.cumsum(-1)
    draws = torch.cat([torch.rand(1, generator=random, dtype=torch.float64) for random in randoms])
    target = draws.to(reached.device)[:, None] * reached[:, -1:]
    chosen = torch.searchsorted(reached, target, right=True).clamp(max=reached.shape[-1] - 1)
    return (chosen if tokens is None else tokens.gather(-1, chosen))[:, 0]
