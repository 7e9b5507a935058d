"""Topology-free initial weights: each number depends on the seed, the parameter's global name and its place in the
whole tensor, never on rank, mesh or device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from tplaunch.recipe.schema import Model
from tplaunch.spec.lora import B
from tplaunch.spec.parameters import Parameter

_BLOCK_ROWS_BYTES = 64 * 2**20  # a tensor is drawn in runs of rows of about this size, each with its own generator
_TOGETHER = 16  # numbers that the CPU's randn makes of as many
_SCRATCH = 2**16  # numbers that are taken at once where none is wanted: what a core's cache holds


def initial_std(model: Model, parameter: Parameter) -> float:
    """Standard deviation of a matrix: `init_std`, divided by sqrt(2 layers) where it writes into the residual
    stream (GPT-2; Megatron's scaled_init_method_normal)."""
    residual = parameter.name.endswith(("attention.wo.weight", ".down.weight"))
    return model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std


@dataclass(frozen=True)
class Slice:
    """A part of a parameter to be filled.

    Args:
        data: this rank's slice, plain [rows, columns] or [rows].
        parameter: the whole.
        start: where the slice begins in the whole, by dim.
    """

    data: Tensor
    parameter: Parameter
    start: tuple[int, ...]


def initialize(slices: Sequence[Slice], model: Model, seed: int) -> None:
    """Fill slices of parameters in place: matrices normal, norms one, biases, sinks and padding rows zero; of adapters
    A uniform within 1 / sqrt(in), and B zero.

    Only the rows of a slice are drawn, on as many cores as torch uses.
    """
    drawn: list[tuple[Slice, int]] = []
    for part in slices:
        parameter, data = part.parameter, part.data
        if parameter.role in ("bias", "buffer") or parameter.name.endswith(".bias"):
            data.zero_()
        elif parameter.name.endswith(f".{B}"):
            data.zero_()  # an adapter begins without an effect
        elif parameter.role == "norm":
            data.fill_(0.0 if model.norm_plus_one else 1.0)
        else:
            run = _run_of_rows(parameter)
            first, last = part.start[0], part.start[0] + data.shape[0]
            drawn += [(part, block) for block in range(first // run, -(-last // run) if data.numel() else 0)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        done = [pool.submit(_draw, part, block, model, seed) for part, block in drawn]
        for future in done:
            future.result()  # raises what a thread has raised


def _run_of_rows(parameter: Parameter) -> int:
    """Rows that one generator draws."""
    return max(1, _BLOCK_ROWS_BYTES // (4 * parameter.shape[1]))


def _draw(part: Slice, block: int, model: Model, seed: int) -> None:
    """Fill what a slice holds of one run of rows."""
    parameter, data = part.parameter, part.data
    rows, width = parameter.shape
    run = _run_of_rows(parameter)
    first, last = block * run, min((block + 1) * run, rows)
    low, high = max(first, part.start[0]), min(last, part.start[0] + data.shape[0])
    generator = _generator(seed, parameter.name, block)
    if parameter.role == "adapter":
        # As PEFT: kaiming_uniform_ with a = sqrt(5).
        bound = 1 / math.sqrt(width)
        drawn = torch.empty(last - first, width).uniform_(-bound, bound, generator=generator)
        _place(part, drawn, first, low, high)
        return
    begin, drawn = _normal_rows(generator, last - first, width, low - first, high - first)
    begin += first
    drawn *= initial_std(model, parameter)
    real_rows = model.vocab_size if parameter.role in ("embedding", "output") else rows
    drawn[max(0, real_rows - begin) :] = 0.0
    _place(part, drawn, begin, low, high)


def _place(part: Slice, drawn: Tensor, begin: int, low: int, high: int) -> None:
    """Copy rows `low` to `high` of the whole, of drawn rows that start at `begin`, to where a slice has them."""
    data = part.data
    piece = drawn[low - begin : high - begin, part.start[1] : part.start[1] + data.shape[1]]
    data[low - part.start[0] : high - part.start[0]].copy_(piece)


def _normal_rows(generator: torch.Generator, rows: int, width: int, low: int, high: int) -> tuple[int, Tensor]:
    """Rows `low` to `high` of `torch.randn(rows, width)`, and some around them: the first row's number, and the rows.

    The CPU's randn takes one number of its generator for each of its own, makes sixteen of sixteen, and at an end that
    fills no sixteen draws the last sixteen again. What comes before is taken without being made: half of the time, and
    none of the memory.
    """
    together = _TOGETHER // math.gcd(width, _TOGETHER)
    begin, end = low // together * together, -(-high // together) * together
    if end > rows // together * together:
        end = rows
    if (end - begin) * width < _TOGETHER:  # another way of drawing
        begin, end = 0, rows
    scratch = torch.empty(min(_SCRATCH, begin * width))
    for start in range(0, begin * width, _SCRATCH):
        scratch[: begin * width - start].uniform_(generator=generator)
    return begin, torch.randn(end - begin, width, dtype=torch.float32, generator=generator)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = torch.Generator()  # always the CPU's: a GPU draws other numbers
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator
