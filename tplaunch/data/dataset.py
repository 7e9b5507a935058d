"""Training samples from memory-mapped corpora, and a thread that reads them ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.mixture import Ints
from tplaunch.data.order import SampleOrder
from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Source

Batch = TypeVar("Batch")

_OPEN = 128  # corpora that are held open, at two files each: a process may often have 1,024 in all


class TokenDataset:
    """Samples of `seq_len + 1` tokens (inputs and targets overlap) from one corpus or a weighted blend.

    The tokens of a corpus are taken as one row, documents following each other; its sample j is
    `tokens[j * seq_len : (j + 1) * seq_len + 1]`. Which sample comes when is `SampleOrder`'s matter.

    Args:
        sources: prefixes of .bin/.idx pairs, with weights.
        seq_len: tokens of a sample, less the one that only serves as last target.
        seed: of the order.
        shuffle: without it each corpus is read from its start, in order (validation).
        vocab_size: tokens of the model: a corpus is not read whole before it is used.

    Raises:
        TplaunchError: a corpus is missing, damaged, or shorter than one sample.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size
        paths = [Path(source.path) for source in sources]
        self._corpus = lru_cache(_OPEN)(lambda number: IndexedTokens.open(paths[number]))
        sizes = tuple(samples_in(self._corpus(number), seq_len) for number in range(len(paths)))
        self.order = SampleOrder(sizes, tuple(source.weight for source in sources), seed, shuffle)

    def __len__(self) -> int:
        """Samples of all corpora, each counted once; `batch` goes on beyond, epoch after epoch."""
        return sum(self.order.sizes)

    def batch(self, indices: Ints) -> Ints:
        """Tokens of the samples with these numbers in the run, any numbers >= 0.

        Returns:
            int64, shape [len(indices), seq_len + 1].

        Raises:
            TplaunchError: a token is negative, or beyond the vocabulary; its file and byte are named.
        """
        limit = self.vocab_size or np.iinfo(np.int64).max
        out = np.empty((len(indices), self.seq_len + 1), np.int64)
        for row, corpus, start in self._places(indices):
            out[row] = corpus.tokens[start : start + self.seq_len + 1]
            if out[row].min() < 0 or out[row].max() >= limit:
                width = corpus.tokens.itemsize
                corpus.refuse_tokens(start * width, (self.seq_len + 1) * width, self.vocab_size)
        return out

    def batch_with_positions(self, indices: Ints) -> tuple[Ints, Ints]:
        """`batch`, and each token's distance from the start of its document or of the sample, whichever is later.

        A position of 0 marks where attention must not look back further, for per-document masks.

        Returns:
            two int64 arrays of shape [len(indices), seq_len + 1].
        """
        positions = np.empty((len(indices), self.seq_len + 1), np.int64)
        for row, corpus, start in self._places(indices):
            begins = corpus.starts_between(start, start + self.seq_len + 1) - start
            bounds = np.concatenate([[0], begins, [self.seq_len + 1]])
            positions[row] = np.arange(self.seq_len + 1) - np.repeat(bounds[:-1], np.diff(bounds))
        return self.batch(indices), positions

    def _places(self, indices: Ints) -> Iterator[tuple[int, IndexedTokens, int]]:
        """Row, corpus and first token of each sample."""
        corpus, sample = self.order.locate(indices)
        for row, (c, j) in enumerate(zip(corpus.tolist(), sample.tolist(), strict=True)):
            yield row, self._corpus(c), j * self.seq_len


def samples_in(corpus: IndexedTokens, seq_len: int) -> int:
    """Samples of a corpus.

    Raises:
        TplaunchError: not even one.
    """
    count = (len(corpus.tokens) - 1) // seq_len
    if count < 1:
        raise TplaunchError(
            Problem(
                f"{corpus.prefix} holds {len(corpus.tokens):,} tokens, less than one sample of {seq_len:,} + 1",
                fix="use more text, or lower training.seq_len",
            )
        )
    return count


def prefetch(read: Callable[[int], Batch], first: int, last: int, ahead: int = 4) -> Iterator[Batch]:
    """Batches of steps first..last-1 in order, read by one thread up to `ahead` steps before they are asked for.

    Args:
        read: gives the batch of a step.
        first: the first step.
        last: the step after the last.
        ahead: batches held at one time.

    An error of the reading thread is raised at its own step. Closing the iterator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="data")
    try:
        steps = iter(range(first, last))
        waiting: deque[Future[Batch]] = deque(pool.submit(read, step) for step in islice(steps, ahead))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(read, step) for step in islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
