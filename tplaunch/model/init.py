"""Topology-free initial weights: each number depends on the seed, the parameter's global name and its place in the
whole tensor, never on rank, mesh or device."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tplaunch.recipe.schema import Model
from tplaunch.spec.parameters import Parameter

_BLOCK_ROWS_BYTES = 64 * 2**20  # a tensor is drawn in runs of rows of about this size, each with its own generator


def initial_std(model: Model, parameter: Parameter) -> float:
    """Standard deviation of a matrix: `init_std`, divided by sqrt(2 layers) where it writes into the residual
    stream (GPT-2; Megatron's scaled_init_method_normal)."""
    residual = parameter.name.endswith(("attention.wo.weight", "mlp.down.weight"))
    return model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std


def initialize(tensor: Tensor, parameter: Parameter, model: Model, seed: int) -> None:
    """Fill this rank's slice of a parameter in place: matrices normal, norms one, biases and padding rows zero.

    Args:
        tensor: the parameter, a DTensor on its tp mesh (before data-parallel sharding).
        parameter: what it is.
    """
    data = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    data = data.detach()
    if parameter.role == "bias" or parameter.name.endswith(".bias"):
        data.zero_()
    elif parameter.role == "norm":
        data.fill_(1.0)
    else:
        vocabulary = parameter.role in ("embedding", "output")
        real_rows = model.vocab_size if vocabulary else parameter.shape[0]
        _draw(data, parameter, _slice_start(tensor), initial_std(model, parameter), seed, real_rows)


def _slice_start(tensor: Tensor) -> list[int]:
    """Where this rank's slice begins in the whole tensor."""
    start = [0] * tensor.ndim
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                start[placement.dim] += tensor.device_mesh.get_local_rank(dim) * tensor.to_local().shape[placement.dim]
    return start


def _draw(data: Tensor, parameter: Parameter, start: list[int], std: float, seed: int, real_rows: int) -> None:
    rows, width = parameter.shape
    run = max(1, _BLOCK_ROWS_BYTES // (4 * width))
    for block, first in enumerate(range(0, rows, run)):
        last = min(first + run, rows)
        low, high = max(first, start[0]), min(last, start[0] + data.shape[0])
        if low >= high:
            continue  # none of these rows is ours
        whole = torch.randn(last - first, width, dtype=torch.float32, generator=_generator(seed, parameter.name, block))
        whole *= std
        whole[max(0, real_rows - first) :] = 0.0
        piece = whole[low - first : high - first, start[1] : start[1] + data.shape[1]]
        data[low - start[0] : high - start[0]].copy_(piece)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = torch.Generator()  # always the CPU's: a GPU draws other numbers
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
