"""Attention on a GPU by torch's compiled flex_attention (Dong et al. 2024, arXiv 2412.05496): what the kernels for
packed sequences do not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

_BLOCK = 128


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    first_query: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """As `tplaunch.model.attend.attend`; [sq, b, heads, d]."""
    places = torch.arange(first_query, first_query + len(q), device=q.device)
    lowest = torch.zeros_like(places)[None] if starts is None else starts
    if window is not None:
        lowest = torch.maximum(lowest, places - window + 1)
    mask = block_mask(lowest, places, len(k))
    cap = None if softcap is None else _cap(softcap)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    out, more = _compiled()(
        q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=shared, return_aux=AuxRequest(lse=True)
    )
    if sinks is not None:  # they are in the sum of exponentials alone
        share = (more.lse - sinks.to(more.lse.dtype)[:, None]).sigmoid()
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out.permute(2, 0, 1, 3)


def block_mask(lowest: Tensor, places: Tensor, keys: int) -> BlockMask:
    """Which keys queries see, as runs of blocks: nothing is made for each pair of tokens.

    Args:
        lowest: int64 [b or 1, queries], the first key that each sees; in no row less than that before.
        places: int64 [queries], the last; consecutive.
        keys: how many there are.
    """
    queries, blocks = len(places), -(-keys // _BLOCK)
    edge = torch.arange(0, queries, _BLOCK, device=places.device)
    end = (edge + _BLOCK - 1).clamp(max=queries - 1)
    first, last = lowest[:, edge] // _BLOCK, (places[end] // _BLOCK).expand(len(lowest), -1)
    whole_from = -(-lowest[:, end] // _BLOCK)  # blocks that all queries of a block see to the full
    whole_to = ((places[edge] + 1) // _BLOCK).expand_as(whole_from)
    whole = whole_to > whole_from
    whole_from, whole_to = (torch.where(whole, x, last + 1) for x in (whole_from, whole_to))
    number = torch.arange(blocks, device=places.device)
    before = (whole_from - first)[..., None]
    part = torch.where(number < before, first[..., None] + number, whole_to[..., None] + number - before)
    counts = (last + 1 - first) - (whole_to - whole_from)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = 0 if len(lowest) == 1 else batch
        return (key >= lowest[row, query]) & (key <= query + places[0])

    def as_blocks(x: Tensor) -> Tensor:
        return x.clamp(max=blocks - 1).to(torch.int32)[:, None].contiguous()

    return BlockMask.from_kv_blocks(
        counts.to(torch.int32)[:, None].contiguous(),
        as_blocks(part),
        (whole_to - whole_from).to(torch.int32)[:, None].contiguous(),
        as_blocks(whole_from[..., None] + number),
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(queries, keys),
    )


@cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
