"""Attention's core behind one interface: causal, with documents, a window, a soft cap, a scale of its own and sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Attending:
    """How a layer attends.

    Args:
        window: tokens that a query sees, itself included; None: all before it.
        softcap: c, where scores become c tanh(score / c) (Gemma 2, arXiv 2408.00118); None: scores as they are.
        scale: factor of q k^T; None: 1 / sqrt(d).
    """

    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Attending,
    *,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    first_query: int = 0,
) -> Tensor:
    """softmax(q k^T) v over what each query may see.

    Query i stands at place p = first_query + i among the keys, and sees those from max(starts[b, i], p - window + 1)
    to p.

    Args:
        q: [sq, b, heads, d].
        k, v: [sk, b, kv heads, d]; query heads share them in order.
        starts: int64 [b, sq], the place among the keys where each query's document begins; None: 0.
        sinks: [heads], a score of each head that takes part in the softmax and brings no value (gpt-oss).
        first_query: place of the first query among the keys.

    Returns:
        [sq, b, heads * d].
    """
    if first_query + len(q) < len(k):
        k, v = k[: first_query + len(q)], v[: first_query + len(q)]
    plain = how == Attending(scale=how.scale) and starts is None and sinks is None
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if plain and (q.shape[2] == 1 or not first_query):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1], scale=how.scale
        )
    else:
        out = _dense(q, k, v, how, starts, sinks, first_query)
    return out.permute(2, 0, 1, 3).flatten(2)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, how: Attending, starts: Tensor | None, sinks: Tensor | None, first_query: int
) -> Tensor:
    """[b, heads, sq, d] of [b, heads, sq, d] and [b, kv heads, sk, d] twice, by the formula."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(dtype) * (how.scale or q.shape[-1] ** -0.5)
    if how.softcap is not None:
        scores = how.softcap * (scores / how.softcap).tanh()
    places = torch.arange(first_query, first_query + q.shape[2], device=q.device)
    first = torch.zeros_like(places)[None] if starts is None else starts
    if how.window is not None:
        first = torch.maximum(first, places - how.window + 1)
    keys = torch.arange(k.shape[2], device=q.device)
    seen = (keys >= first[..., None]) & (keys <= places[:, None])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def document_starts(positions: Tensor) -> Tensor:
    """Where each token's document begins in its sample.

    Args:
        positions: int64 [b, s], each token's place in its document, which may begin before the sample.

    Returns:
        int64 [b, s].
    """
    return (torch.arange(positions.shape[1], device=positions.device) - positions).clamp(min=0)
