"""Norms over the whole model, the same on any topology: of the weights, of an update, of the gradients by block.

Each number of the model counts once: on the ranks that own it (`GradientFinalizer.owned`), so that weights that are
replicated over tp, copies of a tied embedding and data-parallel replicas count once, and shards add up.

Nothing is copied: what an update did to a weight follows from the optimizer's state after it. Only steps that are
watched cost anything, and of these one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.optim.gradients import GradientFinalizer, square_sum
from tplaunch.optim.muon import Muon
from tplaunch.optim.optimizer import ShardedOptimizer
from tplaunch.recipe.schema import Model
from tplaunch.spec.parameters import Parameter, parameter_shapes

_PIECE = 1 << 18  # elements that temporaries hold at a time: they stay in a core's cache
_GPU_PIECE = 1 << 24  # the same on a GPU: 64 MiB, which a launch of a kernel is small against


def block_of(parameter: Parameter) -> str:
    """The block of a parameter, such as "layers.17"; "embedding", "position", "norm" or "output" outside of blocks."""
    return f"layers.{parameter.layer}" if parameter.layer is not None else parameter.name.split(".")[0]


class Norms:
    """Measures the steps that it is told to watch; every rank makes one and calls the same methods.

    Args:
        gradients: this rank's.
        optimizer: this rank's.
        model: which blocks there are, over all ranks.
    """

    def __init__(self, gradients: GradientFinalizer, optimizer: ShardedOptimizer, model: Model) -> None:
        self.device = gradients.mesh.device
        self.owned = gradients.owned
        self.optimizer = optimizer
        names = dict.fromkeys(block_of(parameter) for parameter in parameter_shapes(model))
        self.blocks = {name: number for number, name in enumerate(names)}
        self._owned = {id(held.shard) for held in self.owned}
        self._watched = self._with_blocks = False
        self._gradients: Tensor | None = None
        self._update: Tensor | None = None
        for part in optimizer.parts.values():
            part.register_step_post_hook(self._updated)

    def watch(self, *, blocks: bool) -> None:
        """Measure the step that begins now; `blocks`: also the gradients of each block."""
        self._watched, self._with_blocks = True, blocks
        self._gradients = self._update = None

    def gradients_complete(self, scale: float) -> None:
        """Called between the backward passes and the update.

        Args:
            scale: that the gradients carry (`LossScale`).
        """
        if self._watched and self._with_blocks:
            squares = torch.zeros(len(self.blocks), dtype=torch.float64, device=self.device)
            for name, number in self.blocks.items():
                mine = [held.gradient for held in self.owned if block_of(held.shard.parameter) == name]
                squares[number] = square_sum(mine).to(self.device)
            self._gradients = squares / scale**2

    def take(self, *, updated: bool) -> dict[str, float]:
        """The norms of the step that was watched, on every rank; the gradients' are before clipping.

        Args:
            updated: whether the step's update was made: of one that the device has skipped the optimizer knows nothing.

        Returns:
            `param_norm`, after the update; `update_ratio`, the update's norm over it, unless the update was skipped;
            `grad_norm/<block>`, where asked for. {} when no step was watched.
        """
        if not self._watched:
            return {}
        self._watched = False
        if not updated:
            self._update = None
        weights = [weight for _, shard, weight in self.optimizer.shards if id(shard) in self._owned]
        parts = [square_sum(weight.detach() for weight in weights).to(self.device).view(1)]
        if self._update is not None:
            parts.append(self._update.view(1))
        if self._gradients is not None:
            parts.append(self._gradients)
        totals = torch.cat(parts)
        dist.all_reduce(totals)
        squares = totals.tolist()
        norm = _root(squares.pop(0))
        found = {"param_norm": norm}
        if self._update is not None:
            found["update_ratio"] = _root(squares.pop(0)) / norm if norm else math.nan
        if self._gradients is not None:
            found |= {f"grad_norm/{name}": _root(square) for name, square in zip(self.blocks, squares, strict=True)}
        return found

    def _updated(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called by the optimizer when it has changed the weights."""
        if self._watched:
            mine = {id(weight) for _, shard, weight in self.optimizer.shards if id(shard) in self._owned}
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for group in optimizer.param_groups:
                weights = [weight for weight in group["params"] if id(weight) in mine]
                if weights:
                    total += _update_square(optimizer, group, weights).to(self.device)
            self._update = total if self._update is None else self._update + total


@torch.no_grad()
def _update_square(optimizer: torch.optim.Optimizer, group: dict[str, Any], weights: list[Tensor]) -> Tensor:
    """Square of the norm of what the last update took from some weights of a group, fp64 []."""
    lr, decay = group["lr"], group["weight_decay"]
    # The decay was of the weights before: w = (w_now + lr * direction) / (1 - lr * decay).
    if isinstance(optimizer, torch.optim.AdamW):
        first, second = group["betas"]
        updates = optimizer.state[weights[0]]["step"].double()
        root = (1 - second**updates).sqrt()
        factor = root / (1 - first**updates)
        changes = _adamw_directions(optimizer, weights, decay / factor, group["eps"] * root)
        scale = factor * lr / (1 - lr * decay)
    elif isinstance(optimizer, torch.optim.SGD):
        changes = _sgd_directions(optimizer, weights, decay, momentum=bool(group["momentum"]))
        scale = torch.tensor(lr if group["momentum"] else lr / (1 - lr * decay), dtype=torch.float64)
    elif isinstance(optimizer, Muon):
        changes = _muon_directions(weights, decay)
        scale = torch.tensor(lr / (1 - lr * decay), dtype=torch.float64)
    else:
        raise TypeError(f"what {type(optimizer).__name__} does to a weight is not known")
    total = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    for some in _batches(changes, _piece(weights[0])):
        total += square_sum(some)
    return total * scale.to(total.device).square()


def _adamw_directions(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], decay: Tensor, eps: Tensor
) -> Iterator[Tensor]:
    """mean / (sqrt(mean of squares) + eps) + decay * weight, piece by piece; means without bias correction."""
    for weight in weights:
        state, size = optimizer.state[weight], _piece(weight)
        tensors = (weight.detach(), state["exp_avg"], state["exp_avg_sq"])
        for now, *moments in zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True):
            mean, square = (moment.to(now.dtype) for moment in moments)  # rounded ones are near enough
            yield now.mul(decay).addcdiv_(mean, square.sqrt().add_(eps))


def _sgd_directions(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], decay: float, *, momentum: bool
) -> Iterator[Tensor]:
    """The momentum, which has the decay in it; else gradient + decay * weight."""
    for weight in weights:
        if momentum:
            yield optimizer.state[weight]["momentum_buffer"]
        else:
            assert weight.grad is not None
            yield weight.grad.add(weight.detach(), alpha=decay)


def _muon_directions(weights: list[Tensor], decay: float) -> Iterator[Tensor]:
    """The update, which Muon leaves in the gradient, + decay * weight, piece by piece."""
    for weight in weights:
        assert weight.grad is not None
        size = _piece(weight)
        pairs = zip(weight.grad.reshape(-1).split(size), weight.detach().reshape(-1).split(size), strict=True)
        for update, now in pairs:
            yield update.add(now, alpha=decay)


def _piece(tensor: Tensor) -> int:
    return _GPU_PIECE if tensor.is_cuda else _PIECE


def _batches(tensors: Iterable[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Tensors in lists of so many elements, or a little more: one call sums the squares of many small ones."""
    some: list[Tensor] = []
    for tensor in tensors:
        some.append(tensor)
        if sum(one.numel() for one in some) >= elements:
            yield some
            some = []
    if some:
        yield some


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
