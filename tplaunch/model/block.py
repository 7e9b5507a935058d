"""One transformer block: attention and MLP, each one tensor-parallel region."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from tplaunch.model.attend import Attending, attend
from tplaunch.model.cache import BlockCache
from tplaunch.model.latent import LatentAttention
from tplaunch.model.mlp import MLP
from tplaunch.model.moe import MoE
from tplaunch.model.norm import HeadsRMSNorm, RMSNorm, make_norm
from tplaunch.model.recompute import Gathered, Recomputation, Run, run_once
from tplaunch.model.residual import added
from tplaunch.model.rope import apply_rope, split_heads
from tplaunch.model.watch import on_backward
from tplaunch.parallel.context import begin_gather, end_gather, to_heads, to_tokens
from tplaunch.parallel.layers import ColumnPair, ColumnParallelLinear, RowParallelLinear, column_parallel
from tplaunch.parallel.linear import local, parameter
from tplaunch.parallel.mesh import ContextParallel, Mesh, TensorParallel
from tplaunch.parallel.split_backward import read_once
from tplaunch.recipe.schema import Model, Part
from tplaunch.spec.recompute import effective

# What a block does beside its parts where ranks share a sequence: it gathers keys and values, attends with one piece of
# the sequence after the other, and joins what that gives; with Ulysses it exchanges tokens for heads and, behind
# attention, heads for tokens.
GATHERED, JOINED, HEADS, TOKENS = "gathered", "joined", "heads", "tokens"


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; heads are split over the tp ranks.

    With fewer key/value heads than tp ranks, neighbouring ranks hold copies of one head, as Megatron does.
    """

    compiled = ("turn",)

    def __init__(self, model: Model, mesh: Mesh, *, layer: int) -> None:
        super().__init__()
        assert model.num_kv_heads is not None and model.head_dim is not None
        tp = mesh.tp
        self.head_dim = model.head_dim
        self.how = Attending(model.window_of(layer), model.attention_softcap, model.attention_scale)
        kv_mesh: DeviceMesh = tp.mesh
        kv_placements: tuple[Placement, ...] = (Shard(0),)
        if model.num_kv_heads < tp.size:
            kv_mesh, kv_placements = mesh.key_value(model.num_kv_heads), (Shard(0), Replicate())
        kv_features = model.num_kv_heads * model.head_dim
        features = model.num_heads * model.head_dim
        local_kv = max(1, model.num_kv_heads // tp.size) * model.head_dim
        self.features = [features // tp.size, local_kv, local_kv]  # of this rank's queries, keys and values
        self.wq = ColumnParallelLinear(model.hidden_size, features, bias=model.qkv_bias, tp=tp)
        self.wk, self.wv = (
            ColumnParallelLinear(
                model.hidden_size, kv_features, bias=model.qkv_bias, tp=tp, mesh=kv_mesh, placements=kv_placements
            )
            for _ in range(2)
        )
        self.q_norm = _head_norm(model, features, tp.mesh, (Shard(0),), tp=tp)
        self.k_norm = _head_norm(model, kv_features, kv_mesh, kv_placements, tp=tp)
        self.sinks = parameter((model.num_heads,), tp.mesh, (Shard(0),)) if model.attention_sinks else None
        self.wo = RowParallelLinear(features, model.hidden_size, bias=model.linear_bias, tp=tp)
        self.multiplier = model.residual_multiplier

    def project(self, run: Run, x: Tensor) -> tuple[Tensor]:
        """[s or s/tp, b, h] -> queries, keys and values side by side, [s, b, features]."""
        return (run("qkv", self.project_all, x),)

    def project_all(self, x: Tensor) -> Tensor:
        """The part that `project` runs."""
        return column_parallel(x, self.wq, self.wk, self.wv)

    def turn(self, projected: Tensor, rope: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values, [s, b, heads, head_dim] each, normed and rotated where the model does that."""
        early = rope if self.q_norm is None else None  # norms of heads come before the rotation
        q, k, v = split_heads(projected, self.features, self.head_dim, early)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def project_key_value(self, run: Run, x: Tensor, pair: ColumnPair) -> tuple[tuple[Tensor], Tensor]:
        """`project` without queries, and what ties `project_query` to it."""
        projected, link = run("qkv", lambda x: pair.first(x, self.wk, self.wv), x)
        return (projected,), link

    def project_query(self, run: Run, x: Tensor, link: Tensor, pair: ColumnPair) -> Tensor:
        """The rest of `project`, of the same x."""
        return run("qkv", lambda x, link: pair.second(x, link, self.wq), x, link)

    def turn_key_value(self, projected: Tensor, rope: Tensor | None) -> tuple[Tensor, ...]:
        """`turn` of what `project_key_value` gives."""
        k, v = split_heads(projected, self.features[1:], self.head_dim, rope if self.k_norm is None else None)
        if self.k_norm is not None:
            k = self.k_norm(k)
            if rope is not None:
                k = apply_rope(k, rope)
        return k, v

    def turn_query(self, projected: Tensor, rope: Tensor | None) -> Tensor:
        """`turn` of what `project_query` gives."""
        q = projected.unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        return q if rope is None else apply_rope(q, rope)

    def leave(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream [s or s/tp, b, h] and what `attend` gives -> the stream with attention's output."""
        return added(x, self.wo(attended), self.multiplier)


def _head_norm(
    model: Model, features: int, mesh: DeviceMesh, placements: tuple[Placement, ...], *, tp: TensorParallel
) -> RMSNorm | HeadsRMSNorm | None:
    assert model.head_dim is not None
    if not model.qk_norm:
        return None
    eps, plus_one = model.norm_eps, model.norm_plus_one
    if model.qk_norm_all_heads:
        return HeadsRMSNorm(features, eps, plus_one=plus_one, tp=tp, mesh=mesh, placements=placements)
    return RMSNorm(model.head_dim, eps, plus_one=plus_one, tp=tp)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with norms of what is added, or with these alone, where the model
    has them. With a parallel residual, x + attention(norm(x)) + mlp(norm(x)). Experts stand in the MLP's place.

    Args:
        layer: its global number.
        again: the parts that are made again in the backward pass.
    """

    def __init__(self, model: Model, mesh: Mesh, layer: int, *, again: frozenset[Part] = frozenset()) -> None:
        super().__init__()
        self.cp = mesh.cp
        experts = model.has_experts(layer)
        self.again = _with_exchanges(model, effective(model, again, experts=experts), mesh.cp)
        self.compiled = False
        self.parallel = model.parallel_residual
        self.multiplier = model.residual_multiplier
        self.attention_norm = make_norm(model, tp=mesh.tp) if model.pre_norms else None
        self.attention = (Attention if model.latent is None else LatentAttention)(model, mesh, layer=layer)
        self.attention_post_norm = make_norm(model, tp=mesh.tp) if model.post_norms else None
        self.mlp_norm = make_norm(model, tp=mesh.tp) if model.pre_norms else None
        self.mlp = None if experts else MLP(model, mesh)
        self.moe = MoE(model, mesh) if experts else None
        self.mlp_post_norm = make_norm(model, tp=mesh.tp) if model.post_norms else None

    def forward(self, x: Tensor, rope: Tensor | None, starts: Tensor | None, cache: BlockCache | None = None) -> Tensor:
        """[s or s/tp, b, h] -> the same.

        Args:
            rope: [2, s, 1 or b, 1, head_dim], or None.
            starts: int64 [b, s], the place in the whole sequence where the document of each token begins, of those that
                this rank attends with; None: one document a sample.
            cache: of the tokens before these, which are added to it; then without `starts`, and without gradients.
        """
        if not self.again or not torch.is_grad_enabled():
            return self._forward(run_once, x, rope, starts, cache)
        with Recomputation(self.again, compiled=self.compiled) as run:
            return self._forward(run, x, rope, starts)

    def compile_parts(self) -> None:
        """Compile the element-wise work, each part by itself. Between the parts are matmuls, which add up gradients of
        weights in place, attention, and the sum of one residual stream: next to nothing that could be fused. So what is
        kept between them is what is kept without compiling, and what is made again is what was made."""
        self.compiled = True
        for norm in (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm):
            if norm is not None:
                norm.compile()
        turns = self.attention.compiled
        if self.cp is not None and self.cp.kind == "allgather":
            turns = ("turn_key_value", "turn_query")
        mlp = self.mlp if self.moe is None else self.moe.shared  # what experts do goes by counts
        for owner, names in ((self.attention, turns), (mlp, ("activate",))):
            for name in names if owner is not None else ():
                setattr(owner, name, torch.compile(getattr(owner, name)))

    def _forward(
        self, run: Run, x: Tensor, rope: Tensor | None, starts: Tensor | None, cache: BlockCache | None = None
    ) -> Tensor:
        """The steps of `tplaunch.spec.recompute.block_steps`."""
        entering = x
        normed = x if self.attention_norm is None else run("norm", self.attention_norm, x)
        attended, gathered = self._attend(run, normed, rope, starts, cache)
        if cache is not None:
            entering = x = cache.needed(x)
        if self.attention_post_norm is None:
            x = run("attention_output", self.attention.leave, x, attended)
        else:
            made = run("attention_output", self.attention.wo, attended)
            x = run("norm", self._add_normed(self.attention_post_norm), x, made)
        if gathered is not None:
            x = on_backward(x, gathered.start)  # while the projection's gradients are computed
        read = entering if self.parallel else x
        normed = read if self.mlp_norm is None else run("norm", self.mlp_norm, read)
        if self.mlp is None:
            assert self.moe is not None
            made = self.moe(run, normed)
        else:
            activated = run("activation", self.mlp.activate, run("gate_up", self.mlp.enter, normed))
            if self.mlp_post_norm is None:
                return run("down", self.mlp.leave, x, activated)
            made = run("down", self.mlp.down, activated)
        if self.mlp_post_norm is None:
            return added(x, made, self.multiplier)
        return run("norm", self._add_normed(self.mlp_post_norm), x, made)

    def _add_normed(self, norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, made: added(x, norm(made), self.multiplier)

    def _attend(
        self, run: Run, normed: Tensor, rope: Tensor | None, starts: Tensor | None, cache: BlockCache | None
    ) -> tuple[Tensor, Gathered | None]:
        """[s or s/tp, b, h] -> what `Attention.leave` projects, [s, b, features], and what must be told when to be
        gathered again."""
        attention, cp = self.attention, self.cp
        if cp is not None and cp.kind == "allgather":
            return self._attend_to_gathered(run, normed, rope, starts, cp)
        projected = attention.project(run, normed)
        q, k, v = run("rotary", partial(attention.turn, rope=rope), *projected)
        if cache is not None:
            return cache.attend(q, k, v, attention.how, next(iter(self._sinks()), None)), None
        if cp is not None:
            q, k, v = run(HEADS, partial(to_heads, cp=cp), q, k, v)
        core = partial(_attend_whole, how=attention.how, starts=starts)
        attended = run("core_attention", core, q, k, v, *self._sinks())
        return attended if cp is None else run(TOKENS, partial(to_tokens, cp=cp), attended), None

    def _attend_to_gathered(
        self, run: Run, normed: Tensor, rope: Tensor | None, starts: Tensor | None, cp: ContextParallel
    ) -> tuple[Tensor, Gathered | None]:
        """See `_attend`: keys and values come first, and are gathered while queries are projected. In the backward pass
        their gradients are exchanged while that of this projection is computed."""
        attention, pair = self.attention, ColumnPair(self.attention.wo.tp)
        keys_values, link = attention.project_key_value(run, normed, pair)
        mine = run("rotary", partial(attention.turn_key_value, rope=rope), *keys_values)
        begin, end = partial(begin_gather, cp=cp), partial(end_gather, cp=cp, shapes=[x.shape[2:] for x in mine])
        gathering = begin(*mine)
        queries = attention.project_query(run, normed, link, pair)
        q = run("rotary", partial(attention.turn_query, rope=rope), queries)
        gathered = None
        if isinstance(run, Recomputation):
            gathered = run.gathered(begin, end, mine)
            k, v = end(gathering, gradients_there=gathered.stop)
            run.enter(gathered, (k, v))
        else:
            k, v = end(gathering)
        core = partial(_attend_pieces, how=attention.how, starts=starts, pieces=cp.pieces(len(k)))
        sinks = [read_once(sinks, q) for sinks in self._sinks()]  # by each piece
        return run(JOINED, _join, *run("core_attention", core, q, k, v, *sinks)), gathered

    def _sinks(self) -> tuple[Tensor, ...]:
        """Those of the heads that this rank attends with, if any."""
        if self.attention.sinks is None:
            return ()
        sinks = local(self.attention.sinks)
        shared = self.cp is not None and self.cp.kind == "ulysses"
        return (sinks.chunk(self.cp.size)[self.cp.rank] if self.cp is not None and shared else sinks,)


def _with_exchanges(model: Model, again: frozenset[Part], cp: ContextParallel | None) -> frozenset[str]:
    """The parts that are made again, and with them the exchanges whose outcome is not kept.

    What is gathered is as long as the sequence whatever cp is: it is never kept. What is joined is kept in pieces. What
    Ulysses exchanges takes as much memory as what it is made of: it is kept, or not, like that.
    """
    if cp is None:
        return frozenset(again)
    if cp.kind == "allgather":
        return again | {GATHERED, JOINED}
    turned: Part = "rotary" if model.qk_norm or model.position == "rope" else "qkv"
    return again | {name for name, part in ((HEADS, turned), (TOKENS, "core_attention")) if part in again}


def _attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    how: Attending,
    starts: Tensor | None,
) -> Tensor:
    """`attend` as a part that is run: every tensor with a gradient is one that it reads."""
    return attend(q, k, v, how, starts=starts, sinks=sinks)


def _attend_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    how: Attending,
    starts: Tensor | None,
    pieces: list[range],
) -> tuple[Tensor, ...]:
    """`attend` with the queries of each of some pieces of the sequence, which follow each other in q and `starts`."""
    sizes = [len(piece) for piece in pieces]
    begins = [None] * len(pieces) if starts is None else starts.split(sizes, 1)
    return tuple(
        attend(part, k, v, how, starts=begin, sinks=sinks, first_query=piece.start)
        for part, begin, piece in zip(q.split(sizes), begins, pieces, strict=True)
    )


def _join(*pieces: Tensor) -> Tensor:
    return torch.cat(pieces)
