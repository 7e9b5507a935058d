"""Norms over the whole model, the same on any topology: of the weights, of an update, of the gradients by block.

Each number of the model counts once: on the ranks that own it (`GradientFinalizer.owned`), so that weights that are
replicated over tp, copies of a tied embedding and data-parallel replicas count once, and shards add up.

Nothing is copied: what an update did to a weight follows from the optimizer's state after it. Only steps that are
watched cost anything, and of these one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.optim.gradients import GradientFinalizer, square_sum
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
        optimizer.inner.register_step_post_hook(self._updated)

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

    def take(self) -> dict[str, float]:
        """The norms of the step that was watched, on every rank; the gradients' are before clipping.

        Returns:
            `param_norm`, after the update; `update_ratio`, the update's norm over it, unless the update was skipped;
            `grad_norm/<block>`, where asked for. {} when no step was watched.
        """
        if not self._watched:
            return {}
        self._watched = False
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
                for weight in group["params"]:
                    if id(weight) in mine:
                        for change in _changes(optimizer, group, weight):
                            total += square_sum([change]).to(self.device)
            self._update = total


@torch.no_grad()
def _changes(optimizer: torch.optim.Optimizer, group: dict[str, Any], weight: Tensor) -> Iterator[Tensor]:
    """What the last update took from a weight, piece by piece."""
    state, lr, decay = optimizer.state[weight], group["lr"], group["weight_decay"]
    size = _GPU_PIECE if weight.is_cuda else _PIECE

    def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.detach().reshape(-1).split(size)

    if isinstance(optimizer, torch.optim.AdamW):
        first, second = group["betas"]
        updates = state["step"].to(weight.device, torch.float64)
        step_size, root = lr / (1 - first**updates), (1 - second**updates).sqrt()
        for now, mean, square in zip(
            pieces(weight), pieces(state["exp_avg"]), pieces(state["exp_avg_sq"]), strict=True
        ):
            change = mean / square.sqrt().div_(root).add_(group["eps"])
            change.mul_(step_size)
            if decay:
                change.add_(now, alpha=lr * decay).div_(1 - lr * decay)
            yield change
    elif isinstance(optimizer, torch.optim.SGD):
        if group["momentum"]:
            yield from (buffer * lr for buffer in pieces(state["momentum_buffer"]))
            return
        assert weight.grad is not None
        for now, gradient in zip(pieces(weight), pieces(weight.grad), strict=True):
            yield (gradient + decay * now).mul_(lr).div_(1 - lr * decay)
    else:
        raise TypeError(f"what {type(optimizer).__name__} does to a weight is not known")


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
