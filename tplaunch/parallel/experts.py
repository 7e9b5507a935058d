"""What tokens do on their way through the experts of a layer, as autograd functions: permuted, sent, multiplied, sent
back, summed.

A token goes to several experts: a *row* for each. On its own rank rows are permuted into the order of experts, sent to
the ep ranks that hold these, and there into the order of experts again, whosever they are; where several ranks share
each expert (expert_tp), all of these get each other's rows, and what they make of them is summed
(`tplaunch.spec.experts` tells the collectives). No token is dropped, no row padded. What a rank exchanges is started in
one function and waited for in another, between which something else may run: `begin_*` and `end_*`.

Which rows there are was decided by the router, once: a backward pass, and what is made again for it
(`tplaunch.model.recompute`), go by the same `Routes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tplaunch.parallel.collectives import start_all_gather, start_uneven_all_to_all, wait
from tplaunch.parallel.function import Function
from tplaunch.parallel.mesh import ExpertParallel, Ranks


def read_counts(counts: Tensor, total: int) -> list[int]:
    """Counts of rows on the host: what a layer waits for the device for, once.

    Args:
        counts: int64 [...].
        total: of all counts, if the experts' load is balanced; for who has no numbers (`tplaunch.simulate`).
    """
    return counts.flatten().tolist()


class Groups:
    """Rows in the order of the experts of this rank.

    Args:
        counts: int64 [experts], rows of each.
        rows: of all.
        sizes: the counts on the host, if they were read.
    """

    def __init__(self, counts: Tensor, rows: int, sizes: list[int] | None = None) -> None:
        self.counts = counts
        self.rows = rows
        self._sizes = sizes

    @property
    def sizes(self) -> list[int]:
        """Rows of each expert, on the host."""
        if self._sizes is None:
            self._sizes = read_counts(self.counts, self.rows)
        return self._sizes

    @cached_property
    def ends(self) -> Tensor:
        """int32 [experts], where the rows of each end."""
        return self.counts.cumsum(0).to(torch.int32)

    def numbers(self) -> Tensor:
        """int64 [rows], each row's expert."""
        numbers = torch.arange(len(self.counts), device=self.counts.device)
        return numbers.repeat_interleave(self.counts, output_size=self.rows)


@dataclass(frozen=True)
class Routes:
    """Where the tokens of a microbatch go, from one rank.

    Args:
        slots: int64 [rows], in the order of experts: each row's place among the choices of all tokens.
        places: int64 [tokens, k], the row of each choice.
        counts: int64 [experts of the layer], rows of each.
        groups: the rows that this rank's experts get.
        sent, received: rows for each ep rank, and from each.
        gathered: of the rows that this rank has received those of each expert_tp rank.
        order, back: int64 [rows of `groups`], from the order of the ranks to that of experts and the other way; None
            where these are one.
        ep, tp: the ranks; None: this one alone.
    """

    slots: Tensor
    places: Tensor
    counts: Tensor
    groups: Groups
    sent: list[int]
    received: list[int]
    gathered: list[int]
    order: Tensor | None
    back: Tensor | None
    ep: Ranks | None
    tp: Ranks | None

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [rows], each row's token."""
        return self.slots // self.places.shape[1]


@torch.no_grad()
def make_routes(chosen: Tensor, experts: int, ranks: ExpertParallel) -> Routes:
    """Find the way of each row; every rank of the stage calls it.

    Args:
        chosen: int64 [tokens, k], experts of each token.
        experts: of the layer.
        ranks: where these are.
    """
    flat = chosen.flatten()
    slots = flat.argsort(stable=True)
    places = torch.empty_like(slots)
    places[slots] = torch.arange(len(flat), device=flat.device)
    counts = count(flat, experts)
    ep, tp = (axis if axis.size > 1 else None for axis in (ranks.ep, ranks.tp))
    if ep is None and tp is None:
        groups = Groups(counts, len(flat))
        return Routes(slots, places.view_as(chosen), counts, groups, [], [], [], None, None, None, None)
    mine = experts // ranks.ep.size
    # Of what this rank gets: by expert_tp rank, then by ep rank that it comes from, then by expert.
    each = [mine] * ranks.ep.size
    theirs = counts if ep is None else wait(start_uneven_all_to_all(counts, each, each, ep))
    rows = len(flat)
    if tp is not None:
        theirs = wait(start_all_gather(theirs, tp))
    read = read_counts(torch.cat([counts, theirs]), rows * (1 + ranks.tp.size))
    own, got = read[:experts], torch.tensor(read[experts:]).view(ranks.tp.size, ranks.ep.size, mine)
    sent = [sum(own[first : first + mine]) for first in range(0, experts, mine)]
    received = got[ranks.tp.rank].sum(-1).tolist()
    gathered = got.sum((1, 2)).tolist()
    sizes = got.sum((0, 1)).tolist()
    groups = Groups(theirs.view(-1, mine).sum(0), sum(sizes), sizes)
    order = back = None
    if mine > 1 and len(theirs) > mine:
        numbers = torch.arange(len(theirs), device=flat.device) % mine
        order = numbers.repeat_interleave(theirs, output_size=groups.rows).argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(groups.rows, device=flat.device)
    return Routes(slots, places.view_as(chosen), counts, groups, sent, received, gathered, order, back, ep, tp)


def count(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen: int64 [n] -> int64 [experts], without a wait for the device."""
    return torch.zeros(experts, dtype=torch.int64, device=chosen.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )


class UnderWay:
    """Rows between `begin_*` and `end_*`, and their gradients on the way back: other ones than those of which autograd
    knows the shape, for a rank gets other rows than it sends. The graph has an empty tensor in their place.

    Args:
        routes: their way.
    """

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self.link = torch.empty(0)
        self._tensors: tuple[Tensor, ...] = ()

    def take_link(self) -> Tensor:
        """That tensor, once: if it stayed here, the graph would hold this and this the graph, in a circle."""
        link, self.link = self.link, torch.empty(0)
        return link

    def put(self, tensors: tuple[Tensor, ...], *, back: bool = False) -> None:
        """Start to send rows to the ep ranks that hold their experts, or back to whose they are."""
        if (ep := self.routes.ep) is not None:
            sent, received = self.routes.sent, self.routes.received
            sizes = (received, sent) if back else (sent, received)
            tensors = tuple(start_uneven_all_to_all(x, *sizes, ep) for x in tensors)
        self._tensors = tensors

    def take(self) -> tuple[Tensor, ...]:
        """What has come."""
        tensors, self._tensors = self._tensors, ()
        return tensors if self.routes.ep is None else tuple(wait(x) for x in tensors)


def begin_dispatch(x: Tensor, weights: Tensor, routes: Routes) -> UnderWay:
    """Permute tokens and start to send them to their experts.

    Args:
        x: [tokens, h].
        weights: [tokens, k], of what each expert will make of a token.
    """
    under_way = UnderWay(routes)
    under_way.link = _BeginDispatch.apply(x, weights, under_way)
    return under_way


def end_dispatch(under_way: UnderWay) -> tuple[Tensor, Tensor]:
    """Wait for what `begin_dispatch` gave.

    Returns:
        Rows of this rank's experts, [rows, h], and their weights [rows].
    """
    return _EndDispatch.apply(under_way.take_link(), under_way)


@torch.no_grad()
def dispatch_again(x: Tensor, routes: Routes) -> Tensor:
    """The rows of `end_dispatch` once more: [tokens, h] -> [rows, h]."""
    under_way = UnderWay(routes)
    under_way.put((x.index_select(0, routes.tokens),))
    (rows,) = under_way.take()
    return _spread(rows, routes)


def begin_combine(made: Tensor, routes: Routes) -> UnderWay:
    """Start to send back what the experts have made of their rows, [rows, h]; where several ranks share each expert,
    that is summed first."""
    under_way = UnderWay(routes)
    under_way.link = _BeginCombine.apply(made, under_way)
    return under_way


def end_combine(under_way: UnderWay) -> Tensor:
    """Wait for what `begin_combine` gave, and sum each token's rows: [tokens, h]."""
    return _EndCombine.apply(under_way.take_link(), under_way)


def _spread(rows: Tensor, routes: Routes) -> Tensor:
    """What came from ep ranks -> what this rank's experts work on: with the rows of all expert_tp ranks, in the order
    of experts."""
    if (tp := routes.tp) is not None:
        copies = rows.expand(tp.size, *rows.shape).flatten(0, 1)
        rows = wait(start_uneven_all_to_all(copies, [len(rows)] * tp.size, routes.gathered, tp))
    return rows if routes.order is None else rows.index_select(0, routes.order)


def _gather_back(rows: Tensor, routes: Routes) -> Tensor:
    """The other way: the parts that expert_tp ranks have of this rank's rows are summed."""
    if routes.back is not None:
        rows = rows.index_select(0, routes.back)
    if (tp := routes.tp) is not None:
        own = routes.gathered[tp.rank]
        parts = wait(start_uneven_all_to_all(rows, routes.gathered, [own] * tp.size, tp))
        parts = parts.view(tp.size, own, *rows.shape[1:])
        rows = parts.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)
    return rows


def _sum_rows(rows: Tensor, routes: Routes) -> Tensor:
    """The sum of each token's rows: [rows, h] -> [tokens, h], without a copy of them."""
    return F.embedding_bag(routes.places, rows, mode="sum")


class _BeginDispatch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, under_way: UnderWay) -> Tensor:
        ctx.under_way, routes = under_way, under_way.routes
        under_way.put((x.index_select(0, routes.tokens), weights.flatten().index_select(0, routes.slots)))
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, Tensor, None]:
        grad, grad_weights = ctx.under_way.take()
        routes: Routes = ctx.under_way.routes
        places = routes.places
        return _sum_rows(grad, routes), grad_weights.index_select(0, places.flatten()).view_as(places), None


class _EndDispatch(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, under_way: UnderWay) -> tuple[Tensor, Tensor]:
        ctx.under_way = under_way
        rows, weights = under_way.take()
        return _spread(rows, under_way.routes), _spread(weights, under_way.routes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weights: Tensor) -> tuple[Tensor, None]:
        routes: Routes = ctx.under_way.routes
        ctx.under_way.put((_gather_back(grad, routes), _gather_back(grad_weights, routes)), back=True)
        return grad.new_empty(0), None


class _BeginCombine(Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, under_way: UnderWay) -> Tensor:
        ctx.under_way = under_way
        under_way.put((_gather_back(made, under_way.routes),), back=True)
        return made.new_empty(0)

    @staticmethod
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.under_way.take()
        return _spread(grad, ctx.under_way.routes), None


class _EndCombine(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, under_way: UnderWay) -> Tensor:
        ctx.under_way = under_way
        (made,) = under_way.take()
        return _sum_rows(made, under_way.routes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.under_way.put((grad.index_select(0, ctx.under_way.routes.tokens),))
        return grad.new_empty(0), None


class _Cut(Function):
    """This rank's part of a sequence that all tp ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Ranks) -> Tensor:
        ctx.tp = tp
        return x.chunk(tp.size)[tp.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_gather(grad, ctx.tp)), None


class _Join(Function):
    """The other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Ranks) -> Tensor:
        ctx.tp = tp
        return wait(start_all_gather(x, tp))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.tp.size)[ctx.tp.rank], None


def cut_sequence(x: Tensor, tp: Ranks) -> Tensor:
    """This rank's part of what all tp ranks have: [s, ...] -> [s/tp, ...]; rows of zeros make s divisible by tp, where
    one token after another is made."""
    return _Cut.apply(F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % tp.size)) if len(x) % tp.size else x, tp)


def join_sequence(x: Tensor, tp: Ranks, length: int) -> Tensor:
    """All ranks' parts, [s/tp, ...], on each: [s, ...], of which there are as many as they were cut from."""
    joined = _Join.apply(x, tp)
    return joined if len(joined) == length else joined[:length]
