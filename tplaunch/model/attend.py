"""Attention's core behind one interface: causal, with documents, a window, a soft cap, a scale of its own and sinks.

What computes it is chosen here. On no device and by none of them is a tensor made that is as large as the square of the
sequence.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Literal["sdpa", "blocked", "flash_attn", "varlen", "flex"]
# SDPA's kernels, best first, that take values of another width than keys and make nothing of the sequence's square.
_OTHER_VALUES = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


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
    """softmax(q k^T) v over what each query sees.

    Query i stands at place p = first_query + i among the keys, and sees those from max(starts[b, i], p - window + 1)
    to p.

    Args:
        q: [sq, b, heads, d].
        k, v: [sk, b, kv heads, d]; query heads share them in order. d of v may be another.
        starts: int64 [b, sq], the place among the keys where each query's document begins; None: 0.
        sinks: [heads], a score of each head that takes part in the softmax and brings no value (gpt-oss).
        first_query: place of the first query among the keys.

    Returns:
        [sq, b, heads * d of v].
    """
    first, last = 0, first_query + len(q)  # of the keys that some query sees
    if how.window is not None and starts is None:
        first = max(0, first_query - how.window + 1)
    if first or last < len(k):
        k, v, first_query = k[first:last], v[first:last], first_query - first
    window = None if how.window is None or how.window >= len(k) else how.window
    kernel = choose(
        Attending(window, how.softcap, how.scale),
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        queries=len(q),
        first_query=first_query,
        documents=starts is not None,
        sinks=sinks is not None,
    )
    if kernel == "sdpa":
        return _sdpa(q, k, v, how.scale)
    if kernel == "blocked":
        from tplaunch.model.attend_blocked import attend_blocked

        out = attend_blocked(q, k, v, starts, sinks, first_query, window, how.softcap, how.scale)
    elif kernel == "flex":
        from tplaunch.model.attend_flex import attend_flex

        out = attend_flex(q, k, v, starts, sinks, first_query, window, how.softcap, how.scale)
    else:
        from tplaunch.model.attend_packed import attend_packed

        out = attend_packed(kernel, q, k, v, starts, first_query, window, how.softcap, how.scale)
    return out.flatten(2)


def choose(
    how: Attending,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    queries: int,
    first_query: int,
    documents: bool,
    sinks: bool,
) -> Kernel:
    """What computes it.

    Args:
        how: its window is None where all keys are in it.
    """
    on_gpu = device == "cuda"
    fits = head_dim % 8 == value_dim % 8 == 0 and max(head_dim, value_dim) <= 256
    narrow = dtype in (torch.bfloat16, torch.float16) and fits
    causal = how.window is None and how.softcap is None and not (documents or sinks)
    if not on_gpu and value_dim != head_dim:  # SDPA's kernel for a CPU has one width
        return "blocked"
    if causal and (queries == 1 or not first_query) and (not on_gpu or narrow or dtype == torch.float32):
        return "sdpa"
    if not on_gpu or queries == 1 or dtype == torch.float64:
        return "blocked"
    if narrow and not sinks and _has_flash_attn():
        return "flash_attn"
    if narrow and not sinks and how.softcap is None:
        return "varlen"
    return "flex"


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal from the first key on, or of one query that sees all keys."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and q.is_cuda and q.dtype == torch.float32:  # torch's linear kernel for fp32 takes no shared heads
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    same = q.shape[-1] == v.shape[-1]
    with nullcontext() if same else sdpa_kernel(_OTHER_VALUES, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=shared > 1, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def document_starts(positions: Tensor) -> Tensor:
    """Where each token's document begins in its sample.

    Args:
        positions: int64 [b, s], each token's place in its document, which may begin before the sample.

    Returns:
        int64 [b, s].
    """
    return (torch.arange(positions.shape[1], device=positions.device) - positions).clamp(min=0)
