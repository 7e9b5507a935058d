"""FLOPs of a model.

A multiply and an add count as two, and only matrix products count (as Narayanan et al. 2021, arXiv 2104.04473,
appendix, and Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from tplaunch.recipe.schema import Model, Part
from tplaunch.spec.parameters import block_parameters, layer_kinds
from tplaunch.spec.recompute import kept


def block_matmul_parameters(model: Model, layer: int) -> int:
    """Weights of one block that every token is multiplied with; of experts, those of as many as it goes to."""
    parameters = block_parameters(model, layer)
    chosen = sum(p.count for p in parameters if p.role == "expert")
    if model.moe is not None:
        chosen = chosen // model.moe.experts * model.moe.top_k
    return chosen + sum(p.count for p in parameters if p.role in ("matrix", "router"))


def matmul_parameters(model: Model) -> int:
    """Weights that every token is multiplied with: the blocks' matrices and the output layer (tied or not).

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
    matrices: dict[Part, tuple[str, ...]] = {
        "qkv": ("attention.wq", "attention.wk", "attention.wv"),
        "attention_output": ("attention.wo",),
        "gate_up": ("mlp.gate", "mlp.up"),
    }
    made = {step.part for step in kept(model, parts).made}
    names = tuple(f"{name}.weight" for part in made for name in matrices.get(part, ()))
    weights = sum(p.count for p in block_parameters(model, layer) if p.name.endswith(names)) if names else 0
    return 2.0 * weights + (attention_flops_per_token(model, positions) if "core_attention" in made else 0.0)


def model_flops_per_token(model: Model, positions: float) -> float:
    """FLOPs that training on one token needs, forward and backward: 6 N + 12 L (heads head_dim) positions.

    The standard formula, by which MFU is quoted (PaLM appendix B; torchtitan counts alike, and so does Narayanan et
    al. 2021 without its recomputation). N is `matmul_parameters`: without the embedding lookup, with the output
    layer. Attention is counted in full, not halved for the causal mask. Recomputation is not counted.

    Args:
        positions: that attention is counted with (`tplaunch.spec.attention.attended_positions`): the sequence's length,
            fewer with windows and documents.
    """
    attention = 3 * model.num_layers * attention_flops_per_token(model, positions)
    return 6.0 * matmul_parameters(model) + attention
