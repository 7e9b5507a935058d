"""The loss over the validation data, by set, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.data.token_bytes import token_bytes
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.recipe.schema import ValidationSet
from tplaunch.spec.validation import metric
from tplaunch.train.batch import Batch, Dataset, make_batch, open_dataset
from tplaunch.train.step import TrainStep


@dataclass(frozen=True)
class _Set:
    """A set of validation data that is open."""

    of: ValidationSet
    dataset: Dataset
    batches: int


class Validation:
    """Measures the model on the recipe's validation data; every rank makes one and calls the same methods.

    Args:
        step: the step whose model is measured.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step = step

    @cached_property
    def _sets(self) -> list[_Set]:
        recipe, training = self.step.recipe, self.step.recipe.training
        found = []
        for one in recipe.data.validation_sets():
            dataset = open_dataset(recipe, one.sources, shuffle=False)
            most = len(dataset) // training.global_batch_size
            found.append(_Set(one, dataset, max(1, min(one.steps or training.eval_steps, most))))
        return found

    @cached_property
    def _bytes(self) -> tuple[Tensor, Tensor, int] | None:
        """Bytes of each token inside of a text, and at a document's start, and the token before that."""
        recipe = self.step.recipe
        if not isinstance(recipe.data.tokenizer, str):
            return None
        known = token_bytes(Tokenizer(Path(recipe.data.tokenizer), recipe.data.eod), recipe.model.padded_vocab_size)
        return None if known is None else (torch.from_numpy(known[0]), torch.from_numpy(known[1]), known.before)

    def measure(self) -> dict[str, float]:
        """Of each set the mean loss over the targets of its first global batches, the perplexity, and the bits per
        byte: all of the loss, in bits, over the UTF-8 bytes that the targets stand for, where a tokenizer tells these.

        With `training.ema` the same of the averaged weights, once they have begun.

        Returns:
            Metrics by name, the same on every rank; {} without validation data.
        """
        found = self._measure(ema=False)
        averages = self.step.averages
        if found and averages is not None and averages.count:
            with averages.in_place_of_weights():
                found |= self._measure(ema=True)
        return found

    def _measure(self, *, ema: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in self._sets:
            loss, nats, size = self._sums(one)
            found[metric(one.of.name, "loss", ema=ema)] = loss
            found[metric(one.of.name, "perplexity", ema=ema)] = math.exp(loss) if loss < 700 else math.inf
            if size:
                found[metric(one.of.name, "bits_per_byte", ema=ema)] = nats / math.log(2) / size
        return found

    def _sums(self, one: _Set) -> tuple[float, float, int]:
        """The mean loss, all of it in nats, and the bytes of its targets."""
        recipe, mesh = self.step.recipe, self.step.mesh
        size = recipe.training.global_batch_size
        share = size // mesh.topology.dp
        counts_loss = self.step.pipeline.has_loss and mesh.tp.rank == 0
        counts_bytes = counts_loss and not mesh.coordinates.cp  # the ranks that share rows count them once
        totals, counted = torch.zeros(2, dtype=torch.float64, device=mesh.device), 0
        for number in range(one.batches):
            first = number * size + mesh.coordinates.dp * share
            batch = make_batch(recipe, one.dataset, range(first, first + share))
            read = self._bytes_of(batch) if counts_bytes else 0
            batch = batch.to(mesh.device)
            targets = self.step.count_targets(batch, size * recipe.training.seq_len)
            loss = self.step.pipeline.evaluate(batch, 1.0 / targets)
            counted += targets
            if counts_loss:
                totals += torch.stack([loss * targets, torch.full_like(loss, read)])
        dist.all_reduce(totals)
        nats, total_bytes = totals.tolist()
        return nats / counted, nats, int(total_bytes)

    def _bytes_of(self, batch: Batch) -> int:
        """Bytes that the targets of a share stand for; 0 where nothing tells."""
        if self._bytes is None:
            return 0
        inside, at_start, before = self._bytes
        counted = batch.labels != IGNORE
        labels = batch.labels[counted]
        return int(torch.where(batch.tokens[counted] == before, at_start[labels], inside[labels]).sum())
