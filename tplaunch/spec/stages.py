"""Which transformer blocks each pipeline stage holds."""

from __future__ import annotations

from functools import lru_cache

from tplaunch.recipe.schema import Recipe
from tplaunch.spec.attention import attended_positions
from tplaunch.spec.flops import attention_flops_per_token, block_matmul_parameters, repeated_flops_per_token
from tplaunch.spec.gradients import are_added_in_place
from tplaunch.spec.parameters import layer_kinds
from tplaunch.spec.recompute import sets

# FLOPs that a GPU does in the time it moves one byte of its memory (A100 153, H100 295, B200 281): turns the cost of
# the embedding, which only moves bytes, into that of a block.
_FLOPS_PER_BYTE = 200
# Bytes moved per element of an embedded token: 2-byte read and write forward; 2-byte gradient read, 4-byte gradient
# row read and written backward.
_EMBEDDING_BYTES = 14


def layer_cost_ratio(recipe: Recipe) -> tuple[float, float]:
    """Cost in time of the embedding and of the output layer with its loss, in blocks: (first, last).

    What runs is counted: causal attention is half; what is made again runs forward twice; and the loss computes its
    logits twice where its gradients are made in the backward pass, so that fp32 logits never exist whole.
    """
    model, training, seen = recipe.model, recipe.training, attended_positions(recipe) / 2
    weights = sum(number * block_matmul_parameters(model, layer) for layer, number in layer_kinds(model).items())
    forward = 2.0 * weights / model.num_layers + attention_flops_per_token(model, seen)
    blocks = sets(training, range(model.num_layers))
    again = sum(n * repeated_flops_per_token(model, seen, parts) for parts, n in blocks.items())
    block = 3 * forward + again / model.num_layers
    embedding = float(_EMBEDDING_BYTES * _FLOPS_PER_BYTE * model.hidden_size)
    output = (3 if are_added_in_place(recipe) else 4) * 2.0 * model.padded_vocab_size * model.hidden_size
    return embedding / block, output / block


def balanced_layers(recipe: Recipe) -> list[int]:
    """Blocks of each pipeline stage, in stage order, balanced by cost.

    Raises:
        ValueError: fewer layers than stages.
    """
    first, last = layer_cost_ratio(recipe)
    stages = recipe.topology.pp * recipe.topology.virtual_stages
    return list(_balanced(recipe.model.num_layers, stages, first, last))


def stage_ranges(recipe: Recipe) -> list[range]:
    """The global layer numbers of each stage of a resolved recipe, in stage order.

    Raises:
        ValueError: the recipe is not resolved (`tplaunch.spec.resolve`).
    """
    if recipe.topology.stage_layers is None:
        raise ValueError("topology.stage_layers is not known: the recipe is not resolved")
    return layer_ranges(recipe.topology.stage_layers)


@lru_cache(maxsize=1024)
def _balanced(num_layers: int, stages: int, first: float, last: float) -> tuple[int, ...]:
    return tuple(split_layers(num_layers, stages, first=first, last=last))


def split_layers(num_layers: int, stages: int, *, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Layers of each stage, so that the costliest stage is as cheap as can be.

    Args:
        num_layers: transformer blocks.
        stages: pipeline stages (pp x virtual stages).
        first: cost of the embedding, in blocks; the first stage bears it.
        last: cost of the final norm, output layer and loss, in blocks; the last stage bears it.

    Returns:
        `stages` counts that sum to `num_layers`. Every stage has a layer where that many exist.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < stages:
        raise ValueError(f"{num_layers} layers cannot fill {stages} stages")
    counts = [1] * stages
    extra = [0.0] * stages
    extra[0] += first
    extra[-1] += last
    for _ in range(num_layers - stages):
        # Of equally cheap stages the one with the lowest number gets the layer.
        cheapest = min(range(stages), key=lambda s: (counts[s] + extra[s], s))
        counts[cheapest] += 1
    return counts


def layer_ranges(counts: list[int]) -> list[range]:
    """The layer numbers of each stage from their counts."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges
