"""FLOPs of a model.

A multiply and an add count as two, and only matrix products count (as Narayanan et al. 2021, arXiv 2104.04473,
appendix, and Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from typing import NamedTuple

from tplaunch.recipe.schema import Lora, Model, Part
from tplaunch.spec.lora import A, adapted
from tplaunch.spec.parameters import Parameter, block_parameters, layer_kinds
from tplaunch.spec.recompute import kept


def block_matmul_parameters(model: Model, layer: int) -> int:
    """Weights of one block that every token is multiplied with; of experts, those of as many as it goes to."""
    return sum(_met(model, p) for p in block_parameters(model, layer))


def _met(model: Model, parameter: Parameter) -> int:
    """Weights of a parameter that a token is multiplied with."""
    if parameter.role == "expert":
        assert model.moe is not None
        return parameter.count // model.moe.experts * model.moe.top_k
    return parameter.count if parameter.role in ("matrix", "router", "adapter") else 0


def matmul_parameters(model: Model) -> int:
    """Weights that a token is multiplied with: the blocks' matrices and the output layer (tied or not).

    The embedding lookup, positions, norms and biases multiply nothing. The vocabulary is unpadded.
    """
    blocks = sum(number * block_matmul_parameters(model, layer) for layer, number in layer_kinds(model).items())
    return blocks + model.vocab_size * model.hidden_size


def attention_flops_per_token(model: Model, positions: float) -> float:
    """FLOPs of one block's two attention products, forward, for one token that sees so many positions."""
    assert model.head_dim is not None
    return 2.0 * model.num_heads * (model.head_dim + model.value_dim) * positions


def repeated_flops_per_token(model: Model, positions: float, parts: frozenset[Part], layer: int = 0) -> float:
    """FLOPs of what one block makes again for one token, where these parts are made again.

    Args:
        layer: its global number.
    """
    made = kept(model, parts, experts=model.has_experts(layer)).made
    given = {name for step in made for name in step.gives} | {str(step.part) for step in made}
    weights = sum(_met(model, p) for p in block_parameters(model, layer) if _gives(model, p) in given)
    return 2.0 * weights + (attention_flops_per_token(model, positions) if "attended" in given else 0.0)


def _gives(model: Model, parameter: Parameter) -> str:
    """What is made with a matrix (`tplaunch.spec.recompute`)."""
    *_, owner, name, _ = parameter.name.split(".")
    if owner != "attention":
        return "inside" if name in ("gate", "up") else "down"
    if name == "wo":
        return "attention_output"
    if name.endswith("_a"):
        return "latent"
    return "queries" if model.latent is not None and name == "wq" else "projected"


def model_flops_per_token(model: Model, positions: float, lora: Lora | None = None) -> float:
    """FLOPs that training on one token needs, forward and backward: 6 N + 12 L (heads head_dim) positions.

    Beside adapters frozen weights have no gradients, and what is before the first adapter needs none either: see
    `adapted_flops_per_token`.

    The standard formula, by which MFU is quoted (PaLM appendix B; torchtitan counts alike, and so does Narayanan et
    al. 2021 without its recomputation). N is `matmul_parameters`: without the embedding lookup, with the output
    layer; of experts those that a token goes to. Attention is counted in full, not halved for the causal mask; where
    values have another width than queries and keys, with the mean of both. Recomputation is not counted.

    Args:
        positions: that attention is counted with (`tplaunch.spec.attention.attended_positions`): the sequence's length,
            fewer with windows and documents.
    """
    if lora is not None:
        return adapted_flops_per_token(model, positions, lora)
    attention = 3 * model.num_layers * attention_flops_per_token(model, positions)
    return 6.0 * matmul_parameters(model) + attention


def adapted_flops_per_token(model: Model, positions: float, lora: Lora) -> float:
    """The same of a model that is frozen beneath adapters: each matrix forward (2 N), gradients of weights of adapters
    alone (2 N of these), and gradients of inputs (2 N, and twice attention's) where something before them is trained:
    about 4 N.
    """
    core, total, live = attention_flops_per_token(model, positions), 0.0, False
    kinds = {model.has_experts(layer): _Weights.of(model, layer, lora) for layer in layer_kinds(model)}
    for layer in range(model.num_layers):
        weights = kinds[model.has_experts(layer)]
        entering = live
        cost, attended = weights.cost("projected", entering)
        total += cost + core * (3 if attended else 1)
        cost, made = weights.cost("attention_output", attended)
        entering = entering if model.parallel_residual else entering or made
        total += cost
        cost, inside = weights.cost("inside", entering)
        total += cost
        cost, down = weights.cost("down", inside)
        total += cost
        live = live or made or down
    return total + (4.0 if live else 2.0) * model.vocab_size * model.hidden_size


class _Weights(NamedTuple):
    """Weights of a block that a token meets, by what is made with them; of adapters, A's and B's."""

    frozen: dict[str, int]
    inner: dict[str, int]
    outer: dict[str, int]

    @classmethod
    def of(cls, model: Model, layer: int, lora: Lora) -> _Weights:
        found = cls({}, {}, {})
        for parameter in adapted(block_parameters(model, layer), lora):
            kind = found.frozen
            if parameter.role == "adapter":
                kind = found.inner if parameter.name.endswith(f".{A}") else found.outer
            gives = _PLACE.get(given := _gives(model, parameter), given)
            kind[gives] = kind.get(gives, 0) + _met(model, parameter)
        return found

    def cost(self, gives: str, live: bool) -> tuple[float, bool]:
        """FLOPs of making something, and whether it has a gradient, where what it is made of has one (`live`)."""
        frozen, inner, outer = (kind.get(gives, 0) for kind in self)
        total = (4.0 if live else 2.0) * (frozen + inner) + 2.0 * inner + 6.0 * outer
        return total, live or inner > 0


_PLACE = {"latent": "projected", "queries": "projected"}
