"""One transformer block: pre-norm attention and pre-norm MLP, each one tensor-parallel region."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.utils.checkpoint import checkpoint

from tplaunch.model.cache import KeyValueCache
from tplaunch.model.norm import RMSNorm, make_norm
from tplaunch.model.rope import apply_rope, split_heads
from tplaunch.model.swiglu import swiglu
from tplaunch.parallel.layers import ColumnParallelLinear, RowParallelLinear, column_parallel
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Model


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; heads are split over the tp ranks.

    With fewer key/value heads than tp ranks, neighbouring ranks hold copies of one head, as Megatron does.
    """

    def __init__(self, model: Model, mesh: Mesh, *, recompute_core: bool) -> None:
        super().__init__()
        assert model.num_kv_heads is not None and model.head_dim is not None
        tp = mesh.tp
        self.head_dim = model.head_dim
        self.recompute_core = recompute_core
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
        self.q_norm = RMSNorm(model.head_dim, model.norm_eps, tp=tp) if model.qk_norm else None
        self.k_norm = RMSNorm(model.head_dim, model.norm_eps, tp=tp) if model.qk_norm else None
        self.wo = RowParallelLinear(features, model.hidden_size, bias=model.linear_bias, tp=tp)

    def forward(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[s or s/tp, b, h] -> the same.

        Args:
            rope: [2, s, 1 or b, 1, head_dim], or None.
            mask: bool [b, 1, s, s], or None for a causal one.
            cache: of the tokens before these, which are added to it; then without a mask.
        """
        projected = column_parallel(x, self.wq, self.wk, self.wv)
        early = rope if self.q_norm is None else None  # norms of heads come before the rotation
        q, k, v = split_heads(projected, self.features, self.head_dim, early)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.recompute_core and self.training:
            core = checkpoint(_core, q, k, v, mask, use_reentrant=False)
        else:
            core = _core(q, k, v, mask)
        return self.wo(core)


def _core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T) v, causal without a mask: [s, b, heads, d], [s, b, kv heads, d] x 2 -> [s, b, heads * d].

    A single query is the last token: it attends to all keys.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    causal = mask is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3).flatten(2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), or GELU in its tanh form (GPT-2)."""

    def __init__(self, model: Model, mesh: Mesh) -> None:
        super().__init__()
        hidden, ffn, bias, tp = model.hidden_size, model.ffn_hidden_size, model.linear_bias, mesh.tp
        self.gate = ColumnParallelLinear(hidden, ffn, bias=bias, tp=tp) if model.activation == "swiglu" else None
        self.up = ColumnParallelLinear(hidden, ffn, bias=bias, tp=tp)
        self.down = RowParallelLinear(ffn, hidden, bias=bias, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> the same."""
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(swiglu(column_parallel(x, self.gate, self.up)))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with recompute, its inside is computed again in backward."""

    def __init__(self, model: Model, mesh: Mesh, *, recompute: bool = False, recompute_core: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = make_norm(model, tp=mesh.tp)
        self.attention = Attention(model, mesh, recompute_core=recompute_core)
        self.mlp_norm = make_norm(model, tp=mesh.tp)
        self.mlp = MLP(model, mesh)

    def forward(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[s or s/tp, b, h] -> the same; rope, mask and cache as for `Attention`."""
        if self.recompute and self.training:
            return checkpoint(self._forward, x, rope, mask, use_reentrant=False)
        return self._forward(x, rope, mask, cache)

    def _forward(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))
