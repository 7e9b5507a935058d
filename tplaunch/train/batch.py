"""A rank's share of a step's samples (a pure function, so every rank and resume agrees), and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tplaunch.data.dataset import TokenDataset
from tplaunch.data.packed import PackedDataset
from tplaunch.data.reading import Place
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.parallel.mesh import ContextParallel
from tplaunch.recipe.schema import Recipe, Source
from tplaunch.spec.attention import document_length
from tplaunch.spec.course import Course


def share(course: Course, step: int, dp_rank: int, dp: int, *, ahead: int = 0) -> range:
    """Sample numbers of one data-parallel rank at a step: a contiguous 1/dp of the global batch.

    Args:
        ahead: samples that the run has consumed beyond what this course's steps so far would have: its batch size
            was another one before.
    """
    size = course.batch_size(step) // dp
    start = course.first_sample(step) + ahead + dp_rank * size
    return range(start, start + size)


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch, on its device.

    Rows are whole, until `cut` for a rank that shares them with others.

    Args:
        tokens, labels: int64 [n, s]; a label may be `IGNORE`. Empty on ranks whose stages read neither.
        positions: int64 [n, s], each token's place in its document; None: documents are not told apart.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None = None

    def split(self, size: int) -> list[Batch]:
        """The microbatches of `size` rows."""
        positions = self.positions.split(size) if self.positions is not None else None
        pairs = zip(self.tokens.split(size), self.labels.split(size), strict=True)
        return [Batch(x, y, positions[i] if positions else None) for i, (x, y) in enumerate(pairs)]

    def cut(self, cp: ContextParallel) -> Batch:
        """What a context-parallel rank has of the rows: its pieces of tokens and labels.

        Positions stay whole: of a token's document a part, and its beginning, may lie in another rank's pieces.
        """
        return Batch(cp.cut(self.tokens), cp.cut(self.labels), self.positions)

    def pinned_for(self, device: torch.device) -> Batch:
        """The batch in memory from which a GPU copies while the host goes on. Pinning takes long: not for the thread
        that trains."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; without waiting, where it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tokens, labels = change(self.tokens), change(self.labels)
        return Batch(tokens, labels, None if self.positions is None else change(self.positions))


Dataset = TokenDataset | PackedDataset


def open_dataset(
    recipe: Recipe, sources: Sequence[Source], *, shuffle: bool = True, place: Place | None = None
) -> Dataset:
    """The samples of corpora, of the kind that a recipe says.

    Args:
        place: where in the run they begin.

    Raises:
        TplaunchError: a corpus is missing, damaged, or has no sample.
    """
    training, data = recipe.training, recipe.data
    make = partial(PackedDataset, data.kind) if data.packs else TokenDataset
    vocab_size = recipe.model.vocab_size
    return make(sources, training.seq_len, training.seed, shuffle=shuffle, vocab_size=vocab_size, place=place)


def masks_targets(recipe: Recipe) -> bool:
    """Whether some tokens of a batch may be no targets."""
    return recipe.training.eod_mask_loss or recipe.data.packs


def make_batch(recipe: Recipe, dataset: Dataset, samples: range) -> Batch:
    """Read samples and turn them into inputs and targets as the recipe asks."""
    training, numbers = recipe.training, np.asarray(samples)
    if isinstance(dataset, PackedDataset):
        tokens, loss, places = (torch.from_numpy(array) for array in dataset.batch(numbers))
        if training.document_mask or training.eod_mask_loss:
            loss &= places != 0  # the first of a document follows nothing
        labels = torch.full_like(tokens, IGNORE)  # the last of a row has no token behind it
        labels[:, :-1] = tokens[:, 1:].where(loss[:, 1:], IGNORE)
        return Batch(tokens, labels, places if training.document_mask else None)
    documents = training.eod_mask_loss or training.document_mask
    rows = dataset.batch(numbers, documents=documents)
    if training.eod_mask_loss:
        rows.targets[rows.begins] = IGNORE
    positions = torch.from_numpy(rows.positions) if training.document_mask and rows.positions is not None else None
    return Batch(torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets), positions)


def random_batch(recipe: Recipe, dp: int, reads_data: bool) -> Batch:
    """A data-parallel rank's share of a step of random tokens, of the shapes that its stages would read; documents
    are as long as they are taken to be.

    Args:
        dp: data-parallel ranks.
        reads_data: whether this rank's stages read tokens or labels.
    """
    training = recipe.training
    shape = (training.global_batch_size // dp, training.seq_len if reads_data else 0)
    tokens = torch.randint(recipe.model.vocab_size, shape)
    length = document_length(recipe)
    positions = (torch.arange(shape[1]) % length).repeat(shape[0], 1) if length and reads_data else None
    return Batch(tokens, tokens.roll(-1, 1), positions)
