"""Exponential moving averages of the weights, of each rank's own shards: as `torch.optim.swa_utils.AveragedModel` with
`get_ema_multi_avg_fn` (Polyak & Juditsky 1992; Morales-Brotons et al. 2024, arXiv 2411.18704).

Element by element, like AdamW: no communication, and the same on any topology. What is not trained has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from tplaunch.optim.optimizer import ShardedOptimizer, like_layout
from tplaunch.recipe.schema import Ema
from tplaunch.torch_private import copy_in_place, lerp_in_place


class Averages:
    """The averages of one rank's weights, in the storage dtype.

    Args:
        optimizer: whose weights they are of.
        settings: the recipe's.

    Attributes:
        count: updates that are in them; 0: they have not begun. Part of the run's progress.
    """

    def __init__(self, optimizer: ShardedOptimizer, settings: Ema) -> None:
        self.optimizer, self.settings = optimizer, settings
        self.count = 0
        self._weights = [weight.detach() for _, _, weight in optimizer.shards]
        self._averages = [torch.zeros_like(weight) for weight in self._weights]

    @torch.no_grad()
    def after(self, step: int) -> None:
        """A step's update was made."""
        if step <= self.settings.from_ or step % self.settings.every:
            return
        pairs = [pair for pair in zip(self._averages, self._weights, strict=True) if pair[0].numel()]
        averages, weights = [average for average, _ in pairs], [weight for _, weight in pairs]
        if self.count:
            lerp_in_place(averages, weights, 1 - self.settings.decay)
        else:
            copy_in_place(averages, weights)
        self.count += 1

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the model compute with the averages, for the length of a `with` block; every rank must enter it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.optimizer.settle()
        for average, weight in zip(self._averages, self._weights, strict=True):
            kept = weight.clone()  # one at a time
            weight.copy_(average)
            average.copy_(kept)
        self.optimizer.publish()

    def state(self) -> Iterator[tuple[str, DTensor]]:
        """The averages by global name, as DTensors laid out like the parameters and sharing their memory."""
        for (_, shard, _), average in zip(self.optimizer.shards, self._averages, strict=True):
            yield shard.parameter.name, like_layout(shard.layout, average)
