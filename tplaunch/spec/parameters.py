"""What a model is made of: its parameters by global name, and their tensor-parallel slices.

Torch-free. The planner, the checks and the trainer all read it, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from tplaunch.recipe.schema import Model

Role = Literal["embedding", "position", "matrix", "bias", "norm", "output", "router", "expert", "adapter", "buffer"]


@dataclass(frozen=True)
class Parameter:
    """One parameter by its global name: the same on every topology.

    Args:
        name: global name, such as "layers.17.attention.wq.weight".
        shape: full shape; vocabulary rows are padded.
        layer: number of its block, or None.
        tp_dim: the dimension that tensor parallelism slices; None: every tp rank holds it whole.
        role: what it is; only "matrix", "expert", "router", "embedding", "position", "output" and "adapter" are
            decayed. A "buffer" is kept with the weights, in fp32, and not trained.
        pieces: indivisible parts along `tp_dim` (heads of an attention projection, else rows). With more tp ranks
            than pieces, tp / pieces neighbouring ranks hold the same piece (key/value heads fewer than tp). Of an
            expert's parameter: experts, along `ep_dim`.
        ep_dim: the dimension along which the parameters of a layer's experts lie one after the other, and which expert
            parallelism slices; None: no expert's, so that tp, cp and dp alone say where it is.
        expert_tp_dim: the dimension that tensor parallelism of experts slices; None: all its ranks hold it whole.
        frozen: it stays as it is: adapters are trained in its place (`tplaunch.spec.lora`).
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    tp_dim: int | None
    role: Role
    pieces: int = 1
    ep_dim: int | None = None
    expert_tp_dim: int | None = None
    frozen: bool = False

    @property
    def expert(self) -> bool:
        """Whether it is of the experts, which ep, expert_tp and edp say the place of, not tp, cp and dp."""
        return self.ep_dim is not None

    @property
    def trained(self) -> bool:
        """Whether it has a gradient."""
        return not (self.buffer or self.frozen)

    @property
    def buffer(self) -> bool:
        """Whether it is no parameter for torch: kept with the weights, and not an optimizer's matter."""
        return self.role == "buffer"

    @property
    def count(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def local_shape(self, tp: int, ep: int = 1, expert_tp: int = 1) -> tuple[int, ...]:
        """The slice that one of `tp` ranks holds; of experts, one of ep x expert_tp.

        Raises:
            ValueError: the pieces and tp do not divide one another; ep does not divide the experts, or expert_tp them.
        """
        if self.ep_dim is not None:
            return self._expert_shape(self.ep_dim, ep, expert_tp)
        if self.tp_dim is None:
            return self.shape
        if self.pieces % tp and tp % self.pieces:
            raise ValueError(f"{self.name}: {self.pieces} pieces cannot be shared by tp={tp}")
        shape = list(self.shape)
        shape[self.tp_dim] //= min(tp, self.pieces)
        return tuple(shape)

    def _expert_shape(self, ep_dim: int, ep: int, expert_tp: int) -> tuple[int, ...]:
        if self.pieces % ep:
            raise ValueError(f"{self.name}: {self.pieces} experts cannot be shared by ep={ep}")
        shape = list(self.shape)
        shape[ep_dim] //= ep
        if self.expert_tp_dim is not None:
            if shape[self.expert_tp_dim] % expert_tp:
                raise ValueError(f"{self.name}: {shape[self.expert_tp_dim]} cannot be shared by expert_tp={expert_tp}")
            shape[self.expert_tp_dim] //= expert_tp
        return tuple(shape)

    def local_count(self, tp: int, ep: int = 1, expert_tp: int = 1) -> int:
        """Elements of the slice that one of `tp` ranks holds; of experts, one of ep x expert_tp."""
        return prod(self.local_shape(tp, ep, expert_tp))

    def copies(self, tp: int) -> int:
        """How many of `tp` ranks hold the same slice. Not of experts, whose place tp does not say."""
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


def block_parameters(model: Model, layer: int) -> list[Parameter]:
    """Parameters of one transformer block, by its global number, in the order of its forward pass."""
    hidden, at = model.hidden_size, f"layers.{layer}"
    norm_bias = model.norm == "layernorm"
    parameters = _norm(f"{at}.attention_norm", hidden, layer, bias=norm_bias) if model.pre_norms else []
    parameters += _latent_projections(model, layer) if model.latent else _projections(model, layer)
    into = model.num_heads * model.value_dim
    path = f"{at}.attention.wo"
    parameters += _linear(path, hidden, into, layer, split="row", pieces=model.num_heads, bias=model.linear_bias)
    if model.attention_sinks:
        heads = model.num_heads
        parameters.append(Parameter(f"{at}.attention.sinks", (heads,), layer, 0, "bias", heads))
    if model.post_norms:
        parameters += _norm(f"{at}.attention_post_norm", hidden, layer, bias=norm_bias)
    if model.pre_norms:
        parameters += _norm(f"{at}.mlp_norm", hidden, layer, bias=norm_bias)
    if model.has_experts(layer):
        parameters += _experts(model, layer)
    else:
        parameters += _mlp(model, f"{at}.mlp", model.ffn_hidden_size, layer, bias=model.biased_mlp)
    if model.post_norms:
        parameters += _norm(f"{at}.mlp_post_norm", hidden, layer, bias=norm_bias)
    return parameters


def _projections(model: Model, layer: int) -> list[Parameter]:
    """What makes queries, keys and values."""
    hidden, head_dim, heads, kv_heads = model.hidden_size, model.head_dim, model.num_heads, model.num_kv_heads
    assert head_dim is not None and kv_heads is not None  # derived or refused by the schema and the checks
    at, parameters = f"layers.{layer}.attention", []
    for name, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)):
        path = f"{at}.{name}"
        parameters += _linear(path, count * head_dim, hidden, layer, split="column", pieces=count, bias=model.qkv_bias)
    if model.qk_norm and model.qk_norm_all_heads:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            parameters.append(Parameter(f"{at}.{name}.weight", (count * head_dim,), layer, 0, "norm", count))
    elif model.qk_norm:
        parameters += _norm(f"{at}.q_norm", head_dim, layer, bias=False)
        parameters += _norm(f"{at}.k_norm", head_dim, layer, bias=False)
    return parameters


def _latent_projections(model: Model, layer: int) -> list[Parameter]:
    """The same of latent attention: into short vectors, which all tp ranks make, and out of them by heads."""
    latent, at = model.latent, f"layers.{layer}.attention"
    assert latent is not None
    hidden, heads = model.hidden_size, model.num_heads

    def short(name: str, width: int, more: int = 0) -> list[Parameter]:
        weight = Parameter(f"{at}.w{name}_a.weight", (width + more, hidden), layer, None, "matrix")
        return [weight, *_norm(f"{at}.{name}_a_norm", width, layer, bias=False)]

    def by_heads(name: str, head: int, into: int) -> list[Parameter]:
        return _linear(f"{at}.{name}", heads * head, into, layer, split="column", pieces=heads, bias=False)

    if latent.q_rank is None:
        parameters = by_heads("wq", latent.nope_dim + latent.rope_dim, hidden)
    else:
        parameters = short("q", latent.q_rank) + by_heads("wq_b", latent.nope_dim + latent.rope_dim, latent.q_rank)
    parameters += short("kv", latent.kv_rank, latent.rope_dim)
    return parameters + by_heads("wkv_b", latent.nope_dim + latent.value_dim, latent.kv_rank)


def _mlp(model: Model, at: str, ffn: int, layer: int, *, bias: bool) -> list[Parameter]:
    """A dense MLP."""
    parameters = []
    for name in ("gate", "up") if model.gated else ("up",):
        path = f"{at}.{name}"
        parameters += _linear(path, ffn, model.hidden_size, layer, split="column", pieces=ffn, bias=bias)
    return parameters + _linear(f"{at}.down", model.hidden_size, ffn, layer, split="row", pieces=ffn, bias=bias)


def _experts(model: Model, layer: int) -> list[Parameter]:
    """Router, experts and shared experts. An expert's matrices are [hidden, ffn], one expert's rows below another's:
    (act(x gate) * (x up)) down^T."""
    moe, hidden, at = model.moe, model.hidden_size, f"layers.{layer}.moe"
    assert moe is not None
    number, ffn = moe.experts, moe.ffn_hidden_size
    parameters = [Parameter(f"{at}.router.weight", (number, hidden), layer, None, "router")]
    if moe.biases:
        parameters.append(Parameter(f"{at}.router.bias", (number,), layer, None, "bias"))
    if moe.bias_rate is not None:
        parameters.append(Parameter(f"{at}.router.correction", (number,), layer, None, "buffer"))
    for name in ("gate", "up", "down"):
        path = f"{at}.experts.{name}"
        parameters.append(Parameter(f"{path}.weight", (number * hidden, ffn), layer, None, "expert", number, 0, 1))
        if moe.biases:
            out, cut = (hidden, None) if name == "down" else (ffn, 1)
            parameters.append(Parameter(f"{path}.bias", (number, out), layer, None, "bias", number, 0, cut))
    if moe.shared_ffn_hidden_size is not None:
        parameters += _mlp(model, f"{at}.shared", moe.shared_ffn_hidden_size, layer, bias=False)
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


def layer_kinds(model: Model, layers: Iterable[int] | None = None) -> dict[int, int]:
    """Of some layers, or all, one of each kind (with experts, without) by its number, and how many are like it."""
    found: dict[bool, list[int]] = {}
    for layer in range(model.num_layers) if layers is None else layers:
        found.setdefault(model.has_experts(layer), []).append(layer)
    return {alike[0]: len(alike) for alike in found.values()}


def parameter_count(model: Model, padded: bool = False) -> int:
    """Parameters of the model, tied ones once; without the rows that pad the vocabulary unless `padded`.

    What is not trained (the correction of a router) is not counted, as elsewhere.
    """
    return _total(model, lambda parameter: parameter.count) - (0 if padded else _padding(model))


def active_parameter_count(model: Model) -> int:
    """Of these, those that a token meets: `top_k` of each layer's experts, and all that are no expert's."""

    def active(parameter: Parameter) -> int:
        if model.moe is None or not parameter.expert:
            return parameter.count
        return parameter.count // model.moe.experts * model.moe.top_k

    return _total(model, active) - _padding(model)


def _total(model: Model, count: Callable[[Parameter], int]) -> int:
    def of(parameters: list[Parameter]) -> int:
        return sum(count(parameter) for parameter in parameters if not parameter.buffer)

    blocks = sum(number * of(block_parameters(model, layer)) for layer, number in layer_kinds(model).items())
    return of(first_parameters(model)) + blocks + of(last_parameters(model))
