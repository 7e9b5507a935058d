"""What Muon keeps, multiplies and moves on a rank (`tplaunch.spec.muon`)."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import prod
from typing import NamedTuple

from tplaunch.plan.case import Case, Stage
from tplaunch.recipe.schema import Model
from tplaunch.spec.muon import CHUNK, DTYPE, Matrix, batches, matrices
from tplaunch.spec.optimizer import is_hidden
from tplaunch.spec.parameters import Parameter, block_parameters, layer_kinds

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


class Hidden(NamedTuple):
    """The hidden matrices of a rank's stages.

    Args:
        weights, expert_weights: elements that the rank keeps, of experts apart.
        total, expert_total: elements of them all, on all ranks of the stages.
        flops: of Newton-Schulz, on the rank that has most to do.
        rounds: in which they are orthogonalised.
        largest: share of all their elements that the largest round has.
        working: elements of what that round has in memory as it orthogonalises.
    """

    weights: int
    expert_weights: int
    total: int
    expert_total: int
    flops: float
    rounds: int
    largest: float
    working: float


class _Stages(NamedTuple):
    """Of so many layers without and with experts, on so many ranks."""

    dense: int
    sparse: int
    ranks: int


def hidden(case: Case, stages: list[Stage]) -> Hidden:
    """Those of some stages on one rank."""
    sparse = sum(case.expert_layers(stage) for stage in stages)
    layers = _Stages(sum(len(stage.layers) for stage in stages) - sparse, sparse, case.topology.stage_size)
    model = case.model.model_copy(update={"window_layers": None, "rope_layers": None})
    kept = {True: 0, False: 0}
    for parameter, count in _parameters(model, layers):
        rows, columns = parameter.local_shape(case.topology.tp, case.topology.ep, case.topology.expert_tp)
        shards = case.expert_shards if parameter.expert else case.shards
        kept[parameter.expert] += count * -(-rows // shards) * columns
    return Hidden(kept[False], kept[True], *_work(model, layers))


def update_bytes(case: Case, stages: list[Stage]) -> float:
    """Temporaries of the update at their fullest: a round's matrices, as they come, as they lie, and as they leave."""
    of = hidden(case, stages)
    mine = (of.total + of.expert_total) / case.topology.stage_size * of.largest
    kept = (of.weights + of.expert_weights) * of.largest
    return max(2 * mine, mine + kept, 2 * kept, of.working) * moved_bytes(case)


def moved_bytes(case: Case) -> int:
    """Bytes of an element that is gathered or scattered."""
    return _BYTES[DTYPE[case.recipe.training.precision]]


@lru_cache(maxsize=256)
def _parameters(model: Model, layers: _Stages) -> list[tuple[Parameter, int]]:
    """The hidden matrices of a layer of each kind, and in how many layers they are."""
    return [
        (parameter, layers.sparse if model.has_experts(layer) else layers.dense)
        for layer in layer_kinds(model)
        for parameter in block_parameters(model, layer)
        if is_hidden(parameter)
    ]


@lru_cache(maxsize=256)
def _work(model: Model, layers: _Stages) -> tuple[int, int, float, int, float, float]:
    """The last six of `Hidden`."""
    parameters = [parameter for parameter, count in _parameters(model, layers) for _ in range(count)]
    every = list(matrices(parameters))
    rounds = [[every[number] for number in batch] for batch in batches(every, layers.ranks)]
    if not rounds:
        return 0, 0, 0.0, 0, 0.0, 0.0
    total = sum(matrix.count for matrix in every)
    experts = sum(prod(parameter.shape) for parameter in parameters if parameter.expert)
    # The largest matrix is one rank's, however many there are.
    flops = max(max(matrix.flops for matrix in every), sum(matrix.flops for matrix in every) / layers.ranks)
    largest = max(sum(matrix.count for matrix in one) for one in rounds) / total
    return total - experts, experts, flops, len(rounds), largest, max(_working(one, layers.ranks) for one in rounds)


def _working(one: list[Matrix], ranks: int) -> float:
    """Elements that a rank has in memory as it orthogonalises its part of a round: these, and of one chunk two products
    and, before and after a step, the matrices."""
    sizes = Counter((matrix.rows, matrix.columns) for matrix in one)
    mine = {size: prod(size) * -(-count // ranks) for size, count in sizes.items()}
    temporary = [min(mine[size], max(CHUNK, prod(size))) * (2 + 2 * min(size) / max(size)) for size in mine]
    return max(max(map(prod, mine)), sum(matrix.count for matrix in one) / ranks) + max(temporary)
