"""Attention by blocks of queries, each with the keys that it may see and no others: memory grows linearly with the
sequence, and what a window or documents hide is not computed.

The backward pass makes the softmax again from its log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691). A block's
scores exist whole, so there is no running maximum. Two operators, so that whoever looks at operations sees one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tplaunch.parallel.function import Function
from tplaunch.parallel.split_backward import saved, wanted

_QUERIES = 64  # of a block, at most
_SCORES = 2**21  # elements of a block, unless it has few queries
_FEW = 16

_library = torch.library.Library("tplaunch", "DEF")
_HOW = "Tensor? starts, Tensor? sinks, SymInt first_query, SymInt? window, float? softcap, float? scale"
_library.define(f"attend(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor)")
_library.define(
    "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum, "
    f"{_HOW}) -> (Tensor, Tensor, Tensor)"
)


def attend_blocked(
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
    """As `tplaunch.model.attend.attend`, on any device, in any float type; [sq, b, heads, d of v]."""
    return _Blocked.apply(q, k, v, sinks, starts, (first_query, window, softcap, scale))


class _Blocked(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, starts: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        out, log_sum = torch.ops.tplaunch.attend(q, k, v, starts, sinks, *how)
        ctx.how = how
        ctx.save_for_backward(q, k, v, out, log_sum, sinks, starts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, sinks, starts = saved(ctx, activations=True)
        *need_qkv, need_sinks = wanted(ctx, 0, 1, 2, *([] if sinks is None else [3])) + [False] * (sinks is None)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(need_qkv):
            grads = torch.ops.tplaunch.attend_backward(grad, q, k, v, out, log_sum, starts, sinks, *ctx.how)
        grad_sinks = None
        if need_sinks:
            given = (grad * out).sum(-1, dtype=log_sum.dtype)  # [sq, b, heads]
            share = (sinks.to(log_sum.dtype) - log_sum.permute(2, 0, 1)).exp_()
            grad_sinks = (given * share).sum((0, 1)).neg_().to(sinks.dtype)
        return *grads, grad_sinks, None, None


class _Block(NamedTuple):
    """Queries and the keys that they see.

    Args:
        rows: of the batch.
        queries: their numbers.
        keys: places.
        seen: [queries, keys], which query sees which.
    """

    rows: slice
    queries: slice
    keys: slice
    seen: Tensor


def _blocks(q: Tensor, starts: Tensor | None, first_query: int, window: int | None) -> Iterator[_Block]:
    length, batch, heads = q.shape[:3]
    begins = None if starts is None else starts.tolist()
    for row in [slice(0, batch)] if begins is None else [slice(i, i + 1) for i in range(batch)]:
        together = (row.stop - row.start) * heads
        first = 0
        while first < length:
            lowest = 0 if begins is None else begins[row.start][first]
            if window is not None:
                lowest = max(lowest, first_query + first - window + 1)
            keys = first_query + first - lowest
            count = _QUERIES
            while count > _FEW and together * count * (keys + count) > _SCORES:
                count //= 2
            last = min(first + count, length)
            places = torch.arange(first_query + first, first_query + last, device=q.device)[:, None]
            seen_from = places.new_zeros(()) if starts is None else starts[row.start, first:last, None]
            if window is not None:
                seen_from = torch.maximum(seen_from, places - window + 1)
            columns = torch.arange(lowest, first_query + last, device=q.device)
            seen = (columns >= seen_from) & (columns <= places)
            yield _Block(row, slice(first, last), slice(lowest, first_query + last), seen)
            first = last


def _by_key_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[s, b, heads, d] -> [b, kv heads, heads / kv heads, s, d], contiguous."""
    return x.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4).to(dtype).contiguous()


def _scores(q: Tensor, k: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """[b * kv heads, groups * queries, keys] of scaled queries [b, kv heads, groups, queries, d] and keys [b, kv heads,
    keys, d]; -inf for what is not seen."""
    scores = torch.matmul(q.flatten(2, 3), k.transpose(-1, -2))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(*q.shape[:4], -1).masked_fill_(~seen, -torch.inf)
    return scores


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    first_query: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Values [sq, b, heads, d of v], and the log-sum-exp of each query's scores, sinks among them, [b, heads, sq] in
    fp32 (fp64 for fp64)."""
    dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    log_sum = q.new_empty((q.shape[1], q.shape[2], q.shape[0]), dtype=dtype)
    queries = _by_key_head(q, kv_heads, dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keys, values = _by_key_head(k, kv_heads, dtype)[:, :, 0], _by_key_head(v, kv_heads, dtype)[:, :, 0]
    grouped = log_sum.unflatten(1, (kv_heads, -1))
    targets = out.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4)
    for rows, mine, theirs, seen in _blocks(q, starts, first_query, window):
        part = queries[rows, :, :, mine]
        scores = _scores(part, keys[rows, :, theirs], seen, softcap)
        top = scores.amax(-1, keepdim=True)
        if sinks is not None:
            sink = sinks.to(dtype).view(kv_heads, -1, 1).expand(part.shape[:4]).flatten(2, 3).unsqueeze(-1)
            top = torch.maximum(top, sink)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        if sinks is not None:
            total += (sink - top).exp_()
        values_of = torch.matmul(scores, values[rows, :, theirs]).div_(total)
        targets[rows, :, :, mine] = values_of.view(*part.shape[:4], -1).to(out.dtype)
        grouped[rows, :, :, mine] = total.log_().add_(top).view(part.shape[:4])
    return out, log_sum


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    first_query: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    dtype, kv_heads = log_sum.dtype, k.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    queries, grads = _by_key_head(q, kv_heads, dtype) * factor, _by_key_head(grad, kv_heads, dtype)
    keys, values = _by_key_head(k, kv_heads, dtype)[:, :, 0], _by_key_head(v, kv_heads, dtype)[:, :, 0]
    given = (grad * out).sum(-1, dtype=dtype).permute(1, 2, 0).unflatten(1, (kv_heads, -1))
    grouped = log_sum.unflatten(1, (kv_heads, -1))
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, mine, theirs, seen in _blocks(q, starts, first_query, window):
        part, grad_part = queries[rows, :, :, mine], grads[rows, :, :, mine].flatten(2, 3)
        key, value = keys[rows, :, theirs], values[rows, :, theirs]
        scores = _scores(part, key, seen, softcap)
        slope = None if softcap is None else scores.div(softcap).square_().neg_().add_(1)
        scores.sub_(grouped[rows, :, :, mine].flatten(2, 3).unsqueeze(-1)).exp_()  # probabilities
        grad_v[rows, :, theirs] += torch.matmul(scores.transpose(-1, -2), grad_part)
        grad_scores = torch.matmul(grad_part, value.transpose(-1, -2))
        grad_scores.sub_(given[rows, :, :, mine].flatten(2, 3).unsqueeze(-1)).mul_(scores)
        if slope is not None:
            slope.view(*part.shape[:4], -1).masked_fill_(~seen, 0)  # where a score is -inf
            grad_scores.mul_(slope)
        grad_q[rows, :, :, mine] = torch.matmul(grad_scores, key).mul_(factor).view(part.shape)
        grad_k[rows, :, theirs] += torch.matmul(grad_scores.transpose(-1, -2), part.flatten(2, 3))
    by_place = grad_q.permute(3, 0, 1, 2, 4).flatten(2, 3), *(x.permute(2, 0, 1, 3) for x in (grad_k, grad_v))
    found = tuple(x.to(q.dtype).contiguous() for x in by_place)
    return found[0], found[1], found[2]


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty((q.shape[1], q.shape[2], q.shape[0]), dtype=dtype)


def _attend_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for _name, _function, _fake in (
    ("attend", _attend, _attend_fake),
    ("attend_backward", _attend_backward, _attend_backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tplaunch::{_name}", _fake, lib=_library)
