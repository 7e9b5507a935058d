"""Tensors of Hugging Face's files out of ours, and back (`tplaunch.huggingface.tensors.Way`)."""

from __future__ import annotations

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


def unpack(tensor: HfTensor, whole: Tensor, place: int) -> Tensor:
    """What a tensor of the files says of one of its parts: all rows that are not padding, or an expert's; it may share
    memory.

    Args:
        place: the part's, among them.
    """
    way, count = tensor.way, tensor.pieces
    if way is Way.TURNS:  # as many rows in each part of each head
        return whole.unflatten(0, (count, len(tensor.parts), -1))[:, place].flatten(0, 1)
    if way is Way.EXPERT_TRANSPOSED:
        return whole.t()
    if way is Way.EXPERTS_TRANSPOSED:
        return whole.transpose(1, 2).flatten(0, 1)
    if way is Way.EXPERTS_IN_TURN:
        return whole[..., place :: len(tensor.parts)].flatten(0, -2)
    if way is Way.COLUMNS:
        whole = whole.t()
    first = sum(before.shape[0] for before in tensor.parts[:place])
    return whole if way is Way.EXPERT else whole[first : first + tensor.parts[place].shape[0]]
