"""Tensors of Hugging Face's files out of ours, and where ours lie in them (`tplaunch.huggingface.tensors.Way`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tplaunch.huggingface.tensors import HfTensor, Way


def pack(tensor: HfTensor, parts: list[Tensor]) -> Tensor:
    """The tensor of the files that is made of our parts; it may share their memory."""
    way, count, first = tensor.way, tensor.pieces, parts[0]
    if way is Way.TURNS:
        return torch.stack([part.unflatten(0, (count, -1)) for part in parts], 1).flatten(0, 2)
    if way in (Way.EXPERT, Way.EXPERT_TRANSPOSED):
        mine = first.unflatten(0, (count, -1))[tensor.number]
        return mine.t() if way is Way.EXPERT_TRANSPOSED else mine
    if way is Way.EXPERTS_TRANSPOSED:
        return first.unflatten(0, (count, -1)).transpose(1, 2)
    if way is Way.EXPERTS_IN_TURN:
        return torch.stack(parts, -1).view(tensor.shape)
    if way is Way.COLUMNS:
        return (first if len(parts) == 1 else torch.cat(parts)).t()
    return (first if len(parts) == 1 else torch.cat(parts))[: tensor.shape[0]]


class Block(NamedTuple):
    """Rows of one of our parts in a tensor of the files: row `first + i`, column j (of a vector: 0) is its number
    `start + i * down + j * right`, counted in row-major order."""

    first: int
    rows: int
    start: int
    down: int
    right: int


def blocks(tensor: HfTensor, place: int) -> list[Block]:
    """Where one of the parts of a tensor lies in it: all rows that are not padding, or an expert's.

    Args:
        place: the part's, among them.
    """
    way, count, parts, part = tensor.way, tensor.pieces, len(tensor.parts), tensor.parts[place]
    width = part.shape[1] if len(part.shape) > 1 else 1
    rows, each = part.shape[0], part.shape[0] // count
    if way is Way.TURNS:  # as many rows in each part of each head
        return [Block(i * each, each, (i * parts + place) * each * width, width, 1) for i in range(count)]
    if way is Way.EXPERT:
        return [Block(tensor.number * each, each, 0, width, 1)]
    if way is Way.EXPERT_TRANSPOSED:
        return [Block(tensor.number * each, each, 0, 1, each)]
    if way is Way.EXPERTS_TRANSPOSED:
        return [Block(i * each, each, i * each * width, 1, each) for i in range(count)]
    if way is Way.EXPERTS_IN_TURN:
        return [Block(0, rows, place, parts * width, parts)]
    before = sum(other.shape[0] for other in tensor.parts[:place])
    if way is Way.COLUMNS:
        return [Block(0, rows, before, 1, tensor.shape[1])]
    return [Block(0, min(rows, tensor.shape[0] - before), before * width, width, 1)]
