"""Which transformer blocks each pipeline stage holds."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

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


class LayerCosts(NamedTuple):
    """Costs in time, in mean blocks.

    Args:
        first: the embedding, which the first stage bears.
        last: the output layer with its loss, which the last stage bears.
        more: of layers that cost more or less than the others, by their number, how much.
    """

    first: float
    last: float
    more: tuple[tuple[int, float], ...] = ()


def layer_costs(recipe: Recipe) -> LayerCosts:
    """What the layers and ends of a model cost.

    What runs is counted: causal attention is half; what is made again runs forward twice; and the loss computes its
    logits twice where its gradients are made in the backward pass, so that fp32 logits never exist whole. Of experts
    those count that a token goes to: where layers with experts and layers without differ, the fewer stand out.
    """
    model, training, seen = recipe.model, recipe.training, attended_positions(recipe) / 2
    attention = attention_flops_per_token(model, seen)
    blocks = sets(training, range(model.num_layers))
    passes = 3 if recipe.lora is None else 2  # frozen weights have no gradients

    def cost(layer: int) -> float:
        again = sum(n * repeated_flops_per_token(model, seen, parts, layer) for parts, n in blocks.items())
        matmuls = 2.0 * block_matmul_parameters(model, layer) * passes
        return matmuls + 3 * attention + again / model.num_layers

    kinds = layer_kinds(model)
    costs = {layer: cost(layer) for layer in kinds}
    usual = max(kinds, key=lambda layer: kinds[layer])
    block = costs[usual]
    more = tuple(
        (layer, costs[kind] / block - 1)
        for kind in kinds
        if kind != usual
        for layer in range(model.num_layers)
        if model.has_experts(layer) == model.has_experts(kind)
    )
    embedding = float((_EMBEDDING_BYTES if recipe.lora is None else 4) * _FLOPS_PER_BYTE * model.hidden_size)
    output = (
        (passes if recipe.lora is not None or are_added_in_place(recipe) else 4)
        * 2.0
        * model.padded_vocab_size
        * model.hidden_size
    )
    return LayerCosts(embedding / block, output / block, more)


def balanced_layers(recipe: Recipe) -> list[int]:
    """Blocks of each pipeline stage, in stage order, balanced by cost.

    Raises:
        ValueError: fewer layers than stages.
    """
    stages = recipe.topology.pp * recipe.topology.virtual_stages
    return list(_balanced(recipe.model.num_layers, stages, layer_costs(recipe)))


def stage_ranges(recipe: Recipe) -> list[range]:
    """The global layer numbers of each stage of a resolved recipe, in stage order.

    Raises:
        ValueError: the recipe is not resolved (`tplaunch.spec.resolve`).
    """
    if recipe.topology.stage_layers is None:
        raise ValueError("topology.stage_layers is not known: the recipe is not resolved")
    return layer_ranges(recipe.topology.stage_layers)


@lru_cache(maxsize=1024)
def _balanced(num_layers: int, stages: int, costs: LayerCosts) -> tuple[int, ...]:
    return tuple(split_layers(num_layers, stages, costs))


# Rounds in which unequal layers are split evenly: which stages have those that stand out follows from the split before.
_ROUNDS = 8


def split_layers(num_layers: int, stages: int, costs: LayerCosts = LayerCosts(0.0, 0.0)) -> list[int]:
    """Layers of each stage, so that the costliest stage is as cheap as can be.

    Args:
        num_layers: transformer blocks.
        stages: pipeline stages (pp x virtual stages).

    Returns:
        `stages` counts that sum to `num_layers`. Every stage has a layer where that many exist.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < stages:
        raise ValueError(f"{num_layers} layers cannot fill {stages} stages")
    ends = [0.0] * stages
    ends[0] += costs.first
    ends[-1] += costs.last
    if not costs.more:
        return _fill(num_layers, ends)
    layers = [1.0] * num_layers
    for layer, more in costs.more:
        layers[layer] += more
    extra, best = ends, _packed(layers, ends)
    for _ in range(_ROUNDS):
        counts = _fill(num_layers, extra)
        held = [layers[r.start : r.stop] for r in layer_ranges(counts)]
        if max(map(sum, zip(ends, map(sum, held), strict=True))) <= best.costliest + _EQUAL:
            return counts
        extra = [end + sum(mine) - len(mine) for end, mine in zip(ends, held, strict=True)]
    return best.counts


def _fill(num_layers: int, extra: list[float]) -> list[int]:
    """How many equal layers each stage gets, whose other costs are given."""
    counts = [1] * len(extra)
    for _ in range(num_layers - len(extra)):
        # Of equally cheap stages the one with the lowest number gets the layer.
        cheapest = min(range(len(extra)), key=lambda s: (counts[s] + extra[s], s))
        counts[cheapest] += 1
    return counts


_EQUAL = 1e-9  # of a block


class _Packed(NamedTuple):
    counts: list[int]
    costliest: float


def _packed(layers: list[float], ends: list[float]) -> _Packed:
    """The cheapest costliest stage, by halving, and a split with it: early stages full, the last one what is left."""
    low, high = 0.0, sum(layers) + max(ends)
    best = [1] * (len(ends) - 1) + [len(layers) - len(ends) + 1]
    while high - low > _EQUAL:
        middle = (low + high) / 2
        counts = _pack(layers, ends, middle)
        if counts is None:
            low = middle
        else:
            high, best = middle, counts
    return _Packed(best, high)


def _pack(layers: list[float], ends: list[float], most: float) -> list[int] | None:
    """Layers of each stage, as many as it may cost; None: not all find a place."""
    counts, at = [], 0
    for stage, end in enumerate(ends):
        others = len(ends) - 1 - stage
        cost, start = end, at
        while at < len(layers) - others and cost + layers[at] <= most:
            cost += layers[at]
            at += 1
        if at == start:
            return None
        counts.append(at - start)
    return counts if at == len(layers) else None


def layer_ranges(counts: list[int]) -> list[range]:
    """The layer numbers of each stage from their counts."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges
