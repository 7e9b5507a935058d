"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values, and mostly queries
too, are made of latents: vectors that are narrower than they are, and that no head has to itself.

What makes the latents is whole on every tp rank, what widens them is split by heads. Between the two lies the
edge of the tensor-parallel region: with sequence parallelism it is the latents that are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from tplaunch.model.attend import Attending
from tplaunch.model.norm import RMSNorm
from tplaunch.model.recompute import Run
from tplaunch.model.residual import added
from tplaunch.model.rope import turn_pairs
from tplaunch.parallel.function import Function
from tplaunch.parallel.layers import ColumnPair, ColumnParallelLinear, RowParallelLinear, widened
from tplaunch.parallel.linear import WholeLinear, parameter, whole_linear
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Model

_EPS = 1e-6  # of the latents' norms, whatever the model's: DeepSeek's and transformers' code have it so


class LatentAttention(nn.Module):
    """Causal self-attention whose heads are widened from latents; the interface of `block.Attention`.

    A head's query and key have `nope_dim` channels that are not turned and after them `rope_dim` that are, pair by
    neighbouring pair; those of the key are one vector for all heads.
    """

    compiled = ("normalize", "turn")

    def __init__(self, model: Model, mesh: Mesh, *, layer: int) -> None:
        super().__init__()
        latent = model.latent
        assert latent is not None
        self.tp = tp = mesh.tp
        self.spec = latent
        hidden, heads, key = model.hidden_size, model.num_heads, latent.nope_dim + latent.rope_dim
        self.heads = heads // tp.size
        self.how = Attending(model.window_of(layer), model.attention_softcap, model.attention_scale)
        self.wq = self.wq_a = self.q_a_norm = self.wq_b = None
        if latent.q_rank is None:
            self.wq = ColumnParallelLinear(hidden, heads * key, bias=False, tp=tp)
        else:
            self.wq_a = WholeLinear(hidden, latent.q_rank, tp=tp)
            self.q_a_norm = RMSNorm(latent.q_rank, _EPS, plus_one=False, tp=tp)
            self.wq_b = ColumnParallelLinear(latent.q_rank, heads * key, bias=False, tp=tp)
        self.wkv_a = WholeLinear(hidden, latent.kv_rank + latent.rope_dim, tp=tp)
        self.kv_a_norm = RMSNorm(latent.kv_rank, _EPS, plus_one=False, tp=tp)
        key_value = heads * (latent.nope_dim + latent.value_dim)
        self.wkv_b = ColumnParallelLinear(latent.kv_rank, key_value, bias=False, tp=tp)
        self.sinks = parameter((heads,), tp.mesh, (Shard(0),)) if model.attention_sinks else None
        self.wo = RowParallelLinear(heads * latent.value_dim, hidden, bias=model.linear_bias, tp=tp)
        self.multiplier = model.residual_multiplier

    def project(self, run: Run, x: Tensor) -> tuple[Tensor, ...]:
        """[s or s/tp, b, h] -> queries; keys and values by heads, without what all heads share; that: [s, b, features]
        each."""
        if self.wq is not None:
            return run("qkv", self.wq, x), *self._key_value(run, x)
        narrow = run("norm", self.normalize, run("qkv", self.narrow, x))
        return run("qkv", self.widen, narrow)

    def project_key_value(self, run: Run, x: Tensor, pair: ColumnPair) -> tuple[tuple[Tensor, ...], Tensor]:
        """`project` without queries, and what ties `project_query` to it, which is nothing: the two gather other
        latents."""
        return self._key_value(run, x), x.new_empty(0)

    def project_query(self, run: Run, x: Tensor, link: Tensor, pair: ColumnPair) -> Tensor:
        """The rest of `project`, of the same x."""
        if self.wq is not None:
            return run("qkv", self.wq, x)
        return run("qkv", self.wq_b, run("norm", self.normalize_query, run("qkv", self.wq_a, x)))

    def _key_value(self, run: Run, x: Tensor) -> tuple[Tensor, ...]:
        narrow = run("norm", self.normalize_key_value, run("qkv", self.wkv_a, x))
        return run("qkv", self.widen_key_value, narrow)

    def narrow(self, x: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> what queries are made of, what keys and values are, what all heads share of keys: side
        by side, [s or s/tp, b, q_rank + kv_rank + rope_dim]."""
        assert self.wq_a is not None
        return whole_linear(x, self.wq_a, self.wkv_a)

    def normalize(self, narrow: Tensor) -> Tensor:
        """What `narrow` gives, normed but for its last part."""
        return _normed(narrow, self.q_a_norm, self.kv_a_norm)

    def normalize_query(self, narrow: Tensor) -> Tensor:
        """`normalize` of the first part alone."""
        return _normed(narrow, self.q_a_norm)

    def normalize_key_value(self, narrow: Tensor) -> Tensor:
        """`normalize` of the others."""
        return _normed(narrow, self.kv_a_norm)

    def widen(self, narrow: Tensor) -> tuple[Tensor, ...]:
        """What `normalize` gives -> what `project` does."""
        assert self.wq_b is not None
        return widened(narrow, self.wq_b, self.wkv_b)

    def widen_key_value(self, narrow: Tensor) -> tuple[Tensor, ...]:
        """`widen` of what `normalize_key_value` gives."""
        return widened(narrow, self.wkv_b)

    def turn(self, queries: Tensor, key_value: Tensor, shared: Tensor, rope: Tensor | None) -> tuple[Tensor, ...]:
        """Queries and keys [s, b, heads, nope_dim + rope_dim], and values [s, b, heads, value_dim], of what `project`
        gives."""
        return self.turn_query(queries, rope), *self.turn_key_value(key_value, shared, rope)

    def turn_key_value(self, key_value: Tensor, shared: Tensor, rope: Tensor | None) -> tuple[Tensor, ...]:
        """`turn` of what `project_key_value` gives."""
        assert rope is not None
        return _KeysValues.apply(key_value.unflatten(-1, (self.heads, -1)), shared, rope, self.spec.nope_dim)

    def turn_query(self, queries: Tensor, rope: Tensor | None) -> Tensor:
        """`turn` of what `project_query` gives."""
        assert rope is not None
        return _Queries.apply(queries.unflatten(-1, (self.heads, -1)), rope, self.spec.nope_dim)

    def leave(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream [s or s/tp, b, h] and what `attend` gives -> the stream with attention's output."""
        return added(x, self.wo(attended), self.multiplier)


def _normed(narrow: Tensor, *norms: RMSNorm | None) -> Tensor:
    parts, first = [], 0
    for norm in norms:
        assert norm is not None
        parts.append(norm(narrow.narrow(-1, first, norm.size)))
        first += norm.size
    rest = narrow[..., first:]
    return torch.cat([*parts, rest], -1) if len(parts) > 1 or rest.shape[-1] else parts[0]


class _Queries(Function):
    """Heads [s, b, heads, d], turned from a channel on."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, table: Tensor, first: int) -> Tensor:
        ctx.first = first
        ctx.save_for_backward(table)
        return _turned(heads, table, first, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _turned(grad, table, ctx.first, back=True), None, None


def _turned(heads: Tensor, table: Tensor, first: int, *, back: bool) -> Tensor:
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    out[..., :first].copy_(heads[..., :first])
    turn_pairs(heads[..., first:], table, out[..., first:], back=back)
    return out


class _KeysValues(Function):
    """[s, b, heads, nope_dim + value_dim], and what all heads share, [s, b, rope_dim] -> keys and values."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, shared: Tensor, table: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.first = first
        ctx.save_for_backward(table)
        keys = heads.new_empty((*heads.shape[:-1], first + shared.shape[-1]))
        keys[..., :first].copy_(heads[..., :first])
        turned = torch.empty_like(shared, memory_format=torch.contiguous_format).unsqueeze(2)
        turn_pairs(shared.unsqueeze(2), table, turned, back=False)
        keys[..., first:].copy_(turned)
        return keys, heads[..., first:].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (table,) = ctx.saved_tensors
        first = ctx.first
        grad = torch.cat([grad_keys[..., :first], grad_values], -1)
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_heads = grad_keys[..., first:].sum(2, keepdim=True, dtype=wide)
        shared = torch.empty_like(of_heads, dtype=grad.dtype)
        turn_pairs(of_heads, table, shared, back=True)
        return grad, shared.squeeze(2), None, None
