"""What a model is made of: its parameters by global name, and their tensor-parallel slices.

Torch-free. The planner, the checks and the trainer all read it, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from tplaunch.recipe.schema import Model

Role = Literal["embedding", "position", "matrix", "bias", "norm", "output"]


@dataclass(frozen=True)
class Parameter:
    """One parameter by its global name: the same on every topology.

    Args:
        name: global name, such as "layers.17.attention.wq.weight".
        shape: full shape; vocabulary rows are padded.
        layer: number of its block, or None.
        tp_dim: the dimension that tensor parallelism slices; None: every tp rank holds it whole.
        role: what it is; only "matrix", "embedding", "position" and "output" are decayed.
        pieces: indivisible parts along `tp_dim` (heads of an attention projection, else rows). With more tp ranks
            than pieces, tp / pieces neighbouring ranks hold the same piece (key/value heads fewer than tp).
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    tp_dim: int | None
    role: Role
    pieces: int = 1

    @property
    def count(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The slice that one of `tp` ranks holds.

        Raises:
            ValueError: the pieces and tp do not divide one another.
        """
        if self.tp_dim is None:
            return self.shape
        if self.pieces % tp and tp % self.pieces:
            raise ValueError(f"{self.name}: {self.pieces} pieces cannot be shared by tp={tp}")
        shape = list(self.shape)
        shape[self.tp_dim] //= min(tp, self.pieces)
        return tuple(shape)

    def local_count(self, tp: int) -> int:
        """Elements of the slice that one of `tp` ranks holds."""
        return prod(self.local_shape(tp))

    def copies(self, tp: int) -> int:
        """How many of `tp` ranks hold the same slice."""
        return tp if self.tp_dim is None else max(1, tp // self.pieces)


def _norm(name: str, size: int, layer: int | None, *, bias: bool) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (size,), layer, None, "norm")
    return [weight, replace(weight, name=f"{name}.bias")] if bias else [weight]


def _linear(
    name: str, out: int, into: int, layer: int, *, split: Literal["column", "row"], pieces: int, bias: bool
) -> list[Parameter]:
    """A projection [out, into]; a column-parallel one slices `out` (its bias too), a row-parallel one `into`."""
    tp_dim = 0 if split == "column" else 1
    weight = Parameter(f"{name}.weight", (out, into), layer, tp_dim, "matrix", pieces)
    if not bias:
        return [weight]
    bias_dim = 0 if split == "column" else None
    return [weight, Parameter(f"{name}.bias", (out,), layer, bias_dim, "bias", pieces)]


def block_parameters(model: Model, layer: int = 0) -> list[Parameter]:
    """Parameters of one transformer block, in the order of its forward pass."""
    hidden, ffn, head_dim = model.hidden_size, model.ffn_hidden_size, model.head_dim
    heads, kv_heads = model.num_heads, model.num_kv_heads
    assert head_dim is not None and kv_heads is not None  # derived or refused by the schema and the checks
    at = f"layers.{layer}"
    norm_bias = model.norm == "layernorm"
    parameters = _norm(f"{at}.attention_norm", hidden, layer, bias=norm_bias) if model.pre_norms else []
    for name, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)):
        path = f"{at}.attention.{name}"
        parameters += _linear(path, count * head_dim, hidden, layer, split="column", pieces=count, bias=model.qkv_bias)
    if model.qk_norm and model.qk_norm_all_heads:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            path = f"{at}.attention.{name}.weight"
            parameters.append(Parameter(path, (count * head_dim,), layer, 0, "norm", count))
    elif model.qk_norm:
        parameters += _norm(f"{at}.attention.q_norm", head_dim, layer, bias=False)
        parameters += _norm(f"{at}.attention.k_norm", head_dim, layer, bias=False)
    parameters += _linear(
        f"{at}.attention.wo", hidden, heads * head_dim, layer, split="row", pieces=heads, bias=model.linear_bias
    )
    if model.attention_sinks:
        parameters.append(Parameter(f"{at}.attention.sinks", (heads,), layer, 0, "bias", heads))
    if model.post_norms:
        parameters += _norm(f"{at}.attention_post_norm", hidden, layer, bias=norm_bias)
    if model.pre_norms:
        parameters += _norm(f"{at}.mlp_norm", hidden, layer, bias=norm_bias)
    for name in ("gate", "up") if model.gated else ("up",):
        parameters += _linear(f"{at}.mlp.{name}", ffn, hidden, layer, split="column", pieces=ffn, bias=model.biased_mlp)
    parameters += _linear(f"{at}.mlp.down", hidden, ffn, layer, split="row", pieces=ffn, bias=model.biased_mlp)
    if model.post_norms:
        parameters += _norm(f"{at}.mlp_post_norm", hidden, layer, bias=norm_bias)
    return parameters


def first_parameters(model: Model) -> list[Parameter]:
    """Parameters before the blocks: the embedding and, where positions are learned, their table."""
    vocab, hidden = model.padded_vocab_size, model.hidden_size
    parameters = [Parameter("embedding.weight", (vocab, hidden), None, 0, "embedding", vocab)]
    if model.position == "learned":
        if model.max_position is None:
            raise ValueError("learned positions need model.max_position")
        parameters.append(Parameter("position.weight", (model.max_position, hidden), None, None, "position"))
    return parameters


def last_parameters(model: Model) -> list[Parameter]:
    """Parameters after the blocks: the final norm and, unless tied to the embedding, the output layer."""
    vocab, hidden = model.padded_vocab_size, model.hidden_size
    parameters = _norm("norm", hidden, None, bias=model.norm == "layernorm")
    if not model.tie_embeddings:
        parameters.append(Parameter("output.weight", (vocab, hidden), None, 0, "output", vocab))
    return parameters


def parameter_shapes(model: Model) -> list[Parameter]:
    """Every parameter of the model, once, in the order of the forward pass.

    Raises:
        ValueError: learned positions without `max_position`.
    """
    blocks = [parameter for layer in range(model.num_layers) for parameter in block_parameters(model, layer)]
    return first_parameters(model) + blocks + last_parameters(model)


def stage_parameters(model: Model, layers: Iterable[int], *, first: bool, last: bool) -> list[Parameter]:
    """Parameters that a stage holds. A last stage apart from the first holds its own copy of a tied embedding."""
    parameters = first_parameters(model) if first else []
    for layer in layers:
        parameters += block_parameters(model, layer)
    if last:
        parameters += last_parameters(model)
        if model.tie_embeddings and not first:
            parameters.append(first_parameters(model)[0])
    return parameters


def _padding(model: Model) -> int:
    tables = 1 if model.tie_embeddings else 2
    return (model.padded_vocab_size - model.vocab_size) * model.hidden_size * tables


def parameter_count(model: Model, padded: bool = False) -> int:
    """Parameters of the model, tied ones once; without the rows that pad the vocabulary unless `padded`."""
    ends = sum(p.count for p in first_parameters(model) + last_parameters(model))
    blocks = model.num_layers * sum(p.count for p in block_parameters(model))
    return ends + blocks - (0 if padded else _padding(model))
