"""One transformer block: pre-norm attention and pre-norm MLP, each one tensor-parallel region."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from tplaunch.model.attend import Attending, attend
from tplaunch.model.cache import KeyValueCache
from tplaunch.model.norm import RMSNorm, make_norm
from tplaunch.model.recompute import Recomputation, Run, run_once
from tplaunch.model.rope import apply_rope, split_heads
from tplaunch.model.swiglu import geglu, swiglu
from tplaunch.parallel.layers import ColumnParallelLinear, RowParallelLinear, column_parallel, local, parameter
from tplaunch.parallel.mesh import Mesh, TensorParallel
from tplaunch.recipe.schema import Model, Part
from tplaunch.spec.recompute import effective


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; heads are split over the tp ranks.

    With fewer key/value heads than tp ranks, neighbouring ranks hold copies of one head, as Megatron does.
    """

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
        self.q_norm = _head_norm(model, tp=tp)
        self.k_norm = _head_norm(model, tp=tp)
        self.sinks = parameter((model.num_heads,), tp.mesh, (Shard(0),)) if model.attention_sinks else None
        self.wo = RowParallelLinear(features, model.hidden_size, bias=model.linear_bias, tp=tp)

    def project(self, x: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> queries, keys and values side by side, [s, b, features]."""
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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, starts: Tensor | None, first_query: int
    ) -> Tensor:
        """See `tplaunch.model.attend.attend`."""
        return attend(q, k, v, self.how, starts=starts, sinks=sinks, first_query=first_query)

    def leave(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream [s or s/tp, b, h] and what `attend` gives -> the stream with attention's output."""
        return x + self.wo(attended)


def _head_norm(model: Model, *, tp: TensorParallel) -> RMSNorm | None:
    assert model.head_dim is not None
    return RMSNorm(model.head_dim, model.norm_eps, plus_one=model.norm_plus_one, tp=tp) if model.qk_norm else None


class MLP(nn.Module):
    """SwiGLU or GeGLU (Shazeer 2020, arXiv 2002.05202), or GELU in its tanh form (GPT-2)."""

    def __init__(self, model: Model, mesh: Mesh) -> None:
        super().__init__()
        hidden, ffn, bias, tp = model.hidden_size, model.ffn_hidden_size, model.linear_bias, mesh.tp
        self.gate = ColumnParallelLinear(hidden, ffn, bias=bias, tp=tp) if model.gated else None
        self.glu = geglu if model.activation == "geglu" else swiglu
        self.up = ColumnParallelLinear(hidden, ffn, bias=bias, tp=tp)
        self.down = RowParallelLinear(ffn, hidden, bias=bias, tp=tp)

    def enter(self, x: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> gate, where there is one, and up side by side, [s, b, ffn/tp or twice that]."""
        return self.up(x) if self.gate is None else column_parallel(x, self.gate, self.up)

    def activate(self, x: Tensor) -> Tensor:
        """What `enter` gives -> [s, b, ffn/tp]."""
        return F.gelu(x, approximate="tanh") if self.gate is None else self.glu(x)

    def leave(self, x: Tensor, activated: Tensor) -> Tensor:
        """The residual stream [s or s/tp, b, h] and what `activate` gives -> the stream with the MLP's output."""
        return x + self.down(activated)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with norms of what is added where the model has them.

    Args:
        layer: its global number.
        again: the parts that are made again in the backward pass.
    """

    def __init__(self, model: Model, mesh: Mesh, layer: int, *, again: frozenset[Part] = frozenset()) -> None:
        super().__init__()
        self.again = effective(model, again)
        self.compiled = False
        self.attention_norm = make_norm(model, tp=mesh.tp)
        self.attention = Attention(model, mesh, layer=layer)
        self.attention_post_norm = make_norm(model, tp=mesh.tp) if model.post_norms else None
        self.mlp_norm = make_norm(model, tp=mesh.tp)
        self.mlp = MLP(model, mesh)
        self.mlp_post_norm = make_norm(model, tp=mesh.tp) if model.post_norms else None

    def forward(
        self, x: Tensor, rope: Tensor | None, starts: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[s or s/tp, b, h] -> the same.

        Args:
            rope: [2, s, 1 or b, 1, head_dim], or None.
            starts: int64 [b, s], the place where each token's document begins; None: one document a sample.
            cache: of the tokens before these, which are added to it; then without `starts`, and without gradients.
        """
        if not self.again or not torch.is_grad_enabled():
            return self._forward(run_once, x, rope, starts, cache)
        with Recomputation(self.again, compiled=self.compiled) as run:
            return self._forward(run, x, rope, starts)

    def compile_parts(self) -> None:
        """Compile each part by itself. Between them are matmuls, attention and the sum of one residual stream: next to
        nothing that could be fused. So what is kept between them is what is kept without compiling, and what is made
        again is what was made."""
        self.compiled = True
        for norm in (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm):
            if norm is not None:
                norm.compile()
        for owner, names in (
            (self.attention, ("project", "turn", "leave")),
            (self.mlp, ("enter", "activate", "leave")),
        ):
            for name in names:
                setattr(owner, name, torch.compile(getattr(owner, name)))

    def _forward(
        self, run: Run, x: Tensor, rope: Tensor | None, starts: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """The steps of `tplaunch.spec.recompute.block_steps`."""
        attention, mlp = self.attention, self.mlp
        normed = run("norm", self.attention_norm, x)
        projected = run("qkv", attention.project, normed)
        q, k, v = run("rotary", partial(attention.turn, rope=rope), projected)
        first = 0
        if cache is not None:
            k, v = cache.append(k, v)
            first = len(k) - len(q)
        core = partial(attention.attend, starts=starts, first_query=first)
        attended = run("core_attention", core, q, k, v, *([] if attention.sinks is None else [local(attention.sinks)]))
        if self.attention_post_norm is None:
            x = run("attention_output", attention.leave, x, attended)
        else:
            made = run("attention_output", attention.wo, attended)
            x = run("norm", partial(_add_normed, self.attention_post_norm), x, made)
        normed = run("norm", self.mlp_norm, x)
        inside = run("gate_up", mlp.enter, normed)
        activated = run("activation", mlp.activate, inside)
        if self.mlp_post_norm is None:
            return run("down", mlp.leave, x, activated)
        made = run("down", mlp.down, activated)
        return run("norm", partial(_add_normed, self.mlp_post_norm), x, made)


def _add_normed(norm: nn.Module, x: Tensor, made: Tensor) -> Tensor:
    total: Tensor = x + norm(made)
    return total
