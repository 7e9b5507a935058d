"""Attention of one query a sequence, of sequences of unequal length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.model.attend import Attending


def attend_rows(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, how: Attending, sinks: Tensor | None) -> Tensor:
    """softmax(q k^T) v of what each sequence's query sees; query heads that share a key stand as its queries, so that
    keys are read once.

    Args:
        q: [b, heads, d].
        k, v: [kv heads, b, s, d]; d of v may be another.
        hidden: bool [b, s], the keys that each does not see, window and all; None: it sees all.
        how: its window is in `hidden`.
        sinks: [heads], see `tplaunch.model.attend.attend`.

    Returns:
        [b, heads * d of v].
    """
    q = q.unflatten(1, (len(k), -1))  # [b, kv heads, heads that share, d]
    wide = torch.promote_types(q.dtype, torch.float32)
    plain = how.softcap is None and sinks is None and k.shape[-1] == v.shape[-1]
    if plain and q.dtype != wide and (q.is_cuda or hidden is None):  # on a CPU, SDPA with a mask is the slower
        mask = None if hidden is None else ~hidden[:, None, None].expand(*q.shape[:3], -1)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale).flatten(1)
    q = q.transpose(0, 1).to(wide) * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)
    scores = q @ k.to(wide).transpose(-1, -2)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if hidden is not None:
        scores = scores.masked_fill_(hidden[:, None], -torch.inf)
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        sink = sinks.to(wide).view(len(k), 1, -1, 1).expand(*q.shape[:3], 1)
        shares = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (shares @ v.to(wide)).to(v.dtype).transpose(0, 1).flatten(1)
