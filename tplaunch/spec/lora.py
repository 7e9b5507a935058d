"""Which matrices get low-rank adapters (Hu et al. 2021, arXiv 2106.09685), and what these are. Torch-free.

The adapter of `layers.3.attention.wq.weight`, [out, in], is `layers.3.attention.wq.lora_a`, [rank, in], and
`layers.3.attention.wq.lora_b`, [out, rank]. Where tensor parallelism slices `out`, it slices B, and where it slices
`in`, it slices A; the other factor is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tplaunch.recipe.schema import Lora, Model, Target
from tplaunch.spec.parameters import Parameter, block_parameters, layer_kinds, parameter_count

A, B = "lora_a", "lora_b"
TARGETS: tuple[Target, ...] = ("wq", "wk", "wv", "wo", "gate", "up", "down")


def targets(lora: Lora) -> tuple[Target, ...]:
    """The last parts of the names of matrices that get adapters, in the order of a block."""
    return TARGETS if lora.targets == "all-linear" else tuple(name for name in TARGETS if name in lora.targets)


def is_target(lora: Lora, parameter: Parameter) -> bool:
    """Whether a parameter gets an adapter."""
    owner, _, kind = parameter.name.rpartition(".")
    return parameter.role == "matrix" and kind == "weight" and owner.rpartition(".")[2] in targets(lora)


def adapters(lora: Lora, parameter: Parameter) -> tuple[Parameter, Parameter]:
    """The factors A and B of a matrix."""
    owner = parameter.name.removesuffix("weight")
    out, into = parameter.shape
    rows = replace(parameter, role="adapter", frozen=False)
    inner = replace(rows, name=owner + A, shape=(lora.rank, into), tp_dim=1 if parameter.tp_dim == 1 else None)
    outer = replace(rows, name=owner + B, shape=(out, lora.rank), tp_dim=0 if parameter.tp_dim == 0 else None)
    return inner, outer


def adapted(parameters: Iterable[Parameter], lora: Lora | None) -> list[Parameter]:
    """Parameters as a run holds them: with adapters all of the model's own are frozen, and the adapters follow the
    matrices that they belong to."""
    if lora is None:
        return list(parameters)
    found = []
    for parameter in parameters:
        found.append(replace(parameter, frozen=not parameter.buffer))
        if is_target(lora, parameter):
            found += adapters(lora, parameter)
    return found


def trainable_count(model: Model, lora: Lora | None) -> int:
    """Parameters that are trained: those of adapters, else all of the model (`parameter_count`)."""
    if lora is None:
        return parameter_count(model)
    return sum(
        number * sum(p.count for p in adapted(block_parameters(model, layer), lora) if p.trained)
        for layer, number in layer_kinds(model).items()
    )
