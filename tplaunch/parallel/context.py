"""What the ranks that share a sequence exchange for attention, as autograd functions.

"allgather": a rank holds two pieces of the sequence (`tplaunch.spec.context`), and attends with their queries to the
keys and values of all ranks (Llama 3, arXiv 2407.21783, section 3.3.2). What was gathered is as long as the sequence:
attention does not keep it, but has it gathered again (`tplaunch.model.block`). "ulysses": a rank holds one piece, and
attends over the whole sequence with 1/cp of its heads (DeepSpeed Ulysses, arXiv 2309.14509).

Calls of a layer and microbatch, with the whole tensor that each is of; heads and kv heads are those of a tp rank:

    kind       forward                                    backward
    allgather  all-gather of [s, b, 2 kv heads, d]        the same again; all-to-all of [s, b, 2 kv heads, d]
    ulysses    all-to-all of [s/cp, b, heads + 2 kv, d]   both again, the other way round
               all-to-all of [s/cp, b, heads, d]

There d of values may be another than that of queries and keys. kv is the kv heads, repeated up to the least multiple
that cp divides. The all-to-all of the gradients of keys and values is the first half of a reduce-scatter; the other is
a sum here, of fp32 numbers at least and always in the order of the ranks, where a reduce-scatter would round to the
compute dtype after each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from tplaunch.parallel.collectives import start_all_gather, start_all_to_all, wait
from tplaunch.parallel.mesh import ContextParallel


def begin_gather(k: Tensor, v: Tensor, cp: ContextParallel) -> Tensor:
    """Start to gather keys and values.

    Args:
        k, v: [s/cp, b, kv heads, d], of this rank's pieces; d of each.

    Returns:
        What `end_gather` waits for; good for nothing else.
    """
    return _BeginGather.apply(k, v, cp)


def end_gather(
    under_way: Tensor,
    cp: ContextParallel,
    shapes: Sequence[Sequence[int]],
    gradients_there: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Wait for what `begin_gather` gave.

    Args:
        shapes: kv heads of this rank, and d, of keys and of values.
        gradients_there: called in the backward pass, when nobody needs keys and values any more.

    Returns:
        Keys and values of the whole sequence, in its order: [s, b, kv heads, d] each.
    """
    return _EndGather.apply(under_way, cp, shapes, gradients_there)


def copies_of_heads(kv_heads: int, cp: int) -> int:
    """How often each key/value head is there, for as many to go to each of cp ranks as query heads do."""
    return cp // gcd(kv_heads, cp)


def to_heads(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel) -> tuple[Tensor, ...]:
    """All heads of a piece of the sequence for 1/cp of the heads of the whole.

    Args:
        q: [s/cp, b, heads, d].
        k, v: [s/cp, b, kv heads, d]; d of v may be another.

    Returns:
        [s, b, heads/cp, d], and twice [s, b, the kv heads that these share, d].
    """
    if (copies := copies_of_heads(k.shape[2], cp.size)) > 1:
        k, v = k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    parts = [x.unflatten(2, (cp.size, -1)).movedim(2, 0) for x in (q, k, v)]  # [cp, s/cp, b, heads/cp, d]
    received = _AllToAll.apply(torch.cat([part.flatten(3) for part in parts], 3), cp)
    return _apart(received.flatten(0, 1), [part.shape[3:] for part in parts])


def to_tokens(attended: Tensor, cp: ContextParallel) -> Tensor:
    """The way back: [s, b, heads/cp * d] -> [s/cp, b, heads * d]."""
    received = _AllToAll.apply(attended.unflatten(0, (cp.size, -1)), cp)
    return received.movedim(0, 2).flatten(2)


def _order(cp: ContextParallel, seq_len: int) -> list[int]:
    """Numbers of the pieces in the order in which the ranks hold them, one rank's behind the other's."""
    held = [piece for rank in range(cp.size) for piece in cp.pieces(seq_len, rank)]
    return [piece.start // len(piece) for piece in held]


def _side_by_side(*tensors: Tensor) -> Tensor:
    """[s, b, heads, d] of several, whose d may differ, as one, [s, b, features]."""
    return torch.cat([x.flatten(2) for x in tensors], 2)


def _apart(x: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """The way back, by heads and d of each."""
    parts = x.split([prod(shape) for shape in shapes], 2)
    return tuple(part.unflatten(2, tuple(shape)) for part, shape in zip(parts, shapes, strict=True))


class _BeginGather(torch.autograd.Function):
    """Forward: an all-gather is started. Backward: what `_EndGather` has started is waited for, and summed."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp, ctx.shapes = cp, (k.shape[2:], v.shape[2:])
        return start_all_gather(_side_by_side(k, v), cp)

    @staticmethod
    def backward(ctx: Any, under_way: Tensor) -> tuple[Tensor | None, ...]:
        of_ranks = wait(under_way).unflatten(0, (ctx.cp.size, -1))
        dtype = torch.promote_types(of_ranks.dtype, torch.float32)
        return *_apart(of_ranks.sum(0, dtype=dtype).to(of_ranks.dtype), ctx.shapes), None


class _EndGather(torch.autograd.Function):
    """Forward: an all-gather is waited for. Backward: the gradients are on their way to whose keys they are of."""

    @staticmethod
    def forward(
        ctx: Any,
        under_way: Tensor,
        cp: ContextParallel,
        shapes: Sequence[Sequence[int]],
        gradients_there: Callable[[], None],
    ) -> tuple[Tensor, ...]:
        ctx.cp, ctx.gradients_there = cp, gradients_there
        gathered = wait(under_way)
        order = _order(cp, len(gathered))
        pieces = dict(zip(order, gathered.chunk(len(order)), strict=True))
        both = [_apart(pieces[number], shapes) for number in range(len(order))]
        return tuple(torch.cat(of_pieces) for of_pieces in zip(*both, strict=True))

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gradients_there()
        order = _order(ctx.cp, len(grad_k))
        pieces = list(zip(grad_k.chunk(len(order)), grad_v.chunk(len(order)), strict=True))
        sent = torch.cat([_side_by_side(*pieces[number]) for number in order])
        return start_all_to_all(sent, ctx.cp), None, None, None


class _AllToAll(torch.autograd.Function):
    """The i-th of cp parts of dimension 0 for rank i; the derivative is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp = cp
        return wait(start_all_to_all(x, cp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_to_all(grad, ctx.cp)), None
