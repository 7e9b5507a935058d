"""Attention on a GPU by kernels for packed sequences: flash-attn, where it is installed, or torch's own."""

from __future__ import annotations

import inspect
import weakref
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Pack(NamedTuple):
    """Where sequences lie in a pack of all rows; a sequence's last query and last key are the same token.

    Args:
        queries, keys: int32 [sequences + 1], where each begins, and the end.
        longest_queries, longest_keys: of a sequence.
        begins: by row, the first of its keys that belongs to a sequence.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    begins: tuple[int, ...]


def attend_packed(
    kernel: Literal["flash_attn", "varlen"],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    first_query: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """As `tplaunch.model.attend.attend`, [sq, b, heads, d of v]; what is narrower than the rest is padded."""
    length, batch = q.shape[:2]
    scale, width = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    widest = max(q.shape[-1], width)
    q, k, v = (x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    if starts is None:
        starts = q.new_zeros((), dtype=torch.int64).expand(batch, length)
    pack = _pack_of(starts, first_query)
    keys, values = (
        torch.cat([x[begin:, row] for row, begin in enumerate(pack.begins)]) if batch > 1 else x[pack.begins[0] :, 0]
        for x in (k, v)
    )
    queries = q.transpose(0, 1).flatten(0, 1)
    left = -1 if window is None else window - 1  # these kernels do not count the query itself
    if kernel == "flash_attn":
        out = _flash_attn(queries, keys, values, pack, left, softcap, scale)
    else:
        out = _varlen(queries, keys, values, pack, left, scale)
    return out[..., :width].unflatten(0, (batch, length)).transpose(0, 1)


def make_pack(starts: Tensor, first_query: int) -> Pack:
    """The pack of queries whose documents begin at `starts`, int64 [b, sq], among keys that end with the last query."""
    batch, length = starts.shape
    first = torch.ones_like(starts, dtype=torch.bool)
    first[:, 1:] = starts[:, 1:] != starts[:, :-1]
    where = first.flatten().nonzero().flatten()
    queries = torch.cat([where, where.new_tensor([batch * length])])
    lengths = queries.diff()
    # Keys before a row's first query that are of its document.
    before = torch.where(where % length == 0, first_query - starts.flatten()[where], 0)
    keys = torch.nn.functional.pad((lengths + before).cumsum(0), (1, 0))
    longest = torch.stack([lengths.max(), (lengths + before).max(), *starts[:, 0]]).tolist()
    return Pack(queries.to(torch.int32), keys.to(torch.int32), longest[0], longest[1], tuple(longest[2:]))


_last: tuple[Any, int, Pack] | None = None


def _pack_of(starts: Tensor, first_query: int) -> Pack:
    """The pack; the layers of a stage ask one after another for the same, and the host waits for the GPU once."""
    global _last
    if _last is None or _last[0]() is not starts or _last[1] != first_query:
        _last = weakref.ref(starts), first_query, make_pack(starts, first_query)
    return _last[2]


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, left: int, softcap: float | None, scale: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        pack.queries,
        pack.keys,
        pack.longest_queries,
        pack.longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0) if left >= 0 else (-1, -1),
        softcap=softcap or 0.0,
    )
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, pack: Pack, left: int, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and _shares_heads():
        more["enable_gqa"] = True
    elif shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    longest = pack.longest_queries, pack.longest_keys
    out = varlen_attn(q, k, v, pack.queries, pack.keys, *longest, scale=scale, window_size=(left, 0), **more)
    assert isinstance(out, Tensor)
    return out


@cache
def _shares_heads() -> bool:
    """Whether torch's takes fewer key heads than query heads; up to 2.11 it does not say so."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
