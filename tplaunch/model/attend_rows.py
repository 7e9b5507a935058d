"""Attention of one query a sequence, of sequences of unequal length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.model.attend import Attending


def attend_rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, how: Attending, sinks: Tensor | None) -> Tensor:
    """softmax(q k^T) v of what each sequence's query sees; query heads that share a key stand as its queries, so that
    keys are read once.

    Args:
        q: [b, heads, d].
        k, v: [b, s, kv heads, d]; d of v may be another.
        seen: bool [b, s], the keys that each sees, window and all.
        how: its window is in `seen`.
        sinks: [heads], see `tplaunch.model.attend.attend`.

    Returns:
        [b, heads * d of v].
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    q = q.unflatten(1, (k.shape[1], -1))  # [b, kv heads, heads that share, d]
    mask = seen[:, None, None]
    if how.softcap is None and sinks is None and k.shape[-1] == v.shape[-1]:
        mask = mask.expand(*q.shape[:3], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale).flatten(1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)) @ k.to(wide).transpose(-1, -2)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide).view(k.shape[1], -1, 1).expand(*q.shape[:3], 1)
        shares = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    return (shares @ v.to(wide)).to(v.dtype).flatten(1)
