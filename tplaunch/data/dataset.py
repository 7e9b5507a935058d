"""Training samples from memory-mapped corpora, and a thread that reads them ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.mixture import Ints
from tplaunch.data.order import SampleOrder
from tplaunch.data.reading import Place
from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Source

Batch = TypeVar("Batch")

_OPEN = 128  # corpora that are held open, at two files each: a process may often have 1,024 in all


class TokenRows(NamedTuple):
    """Samples, all of shape [rows, seq_len].

    Args:
        tokens: int64, the inputs.
        targets: int64, the token that follows each in its corpus.
        positions: int64, each token's distance from the start of its document, of its stretch of text or of the
            sample, whichever is latest: 0 marks where attention must not look back further, for per-document masks.
            None: not asked for.
        begins: whether a target begins a document, or follows nothing; None as well.
    """

    tokens: Ints
    targets: Ints
    positions: Ints | None = None
    begins: NDArray[np.bool_] | None = None


class TokenDataset:
    """Samples of `seq_len` tokens and the token that follows each, from one corpus or a weighted blend.

    The tokens of a corpus are taken as one row, documents following each other, and cut into units of `seq_len`, or of
    what `place` says, each with its last target. Which unit comes when is `SampleOrder`'s matter; a sample is what
    comes next of a corpus: a unit, a part of one, or what is left of one and the begin of another.

    Args:
        sources: prefixes of .bin/.idx pairs, with weights.
        seq_len: tokens of a sample.
        seed: of the order.
        shuffle: without it each corpus is read from its start, in order (validation).
        vocab_size: tokens of the model: a corpus is not read whole before it is used.
        place: where in the run, and in its corpora, they begin; default: where all begins.

    Raises:
        TplaunchError: a corpus is missing, damaged, or shorter than one unit.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
        place: Place | None = None,
    ) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size
        paths, every = [Path(source.path) for source in sources], range(len(sources))
        self.place = place or Place(0, tuple(every), (seq_len,) * len(paths), (0,) * len(paths))
        self._corpus = lru_cache(_OPEN)(lambda number: IndexedTokens.open(paths[number]))
        sizes = tuple(samples_in(self._corpus(number), self.place.units[number]) for number in every)
        weights = tuple(source.weight for source in sources)
        self.order = SampleOrder(sizes, weights, seed, shuffle, self.place.numbers)
        self._units, self._starts = (np.array(of_each, np.int64) for of_each in (self.place.units, self.place.starts))

    def __len__(self) -> int:
        """Samples of all corpora, each counted once; `batch` goes on beyond, epoch after epoch."""
        return sum(size * unit for size, unit in zip(self.order.sizes, self.place.units, strict=True)) // self.seq_len

    def batch(self, indices: Ints, *, documents: bool = False) -> TokenRows:
        """The samples with these numbers in the run, any numbers from where these begin on.

        Args:
            documents: tell documents apart.

        Raises:
            TplaunchError: a token is negative, or beyond the vocabulary; its file and byte are named.
        """
        limit = self.vocab_size or np.iinfo(np.int64).max
        shape = (len(indices), self.seq_len)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        positions, begins = np.empty(shape, np.int64), np.zeros(shape, np.bool_)
        for row, at, corpus, start, length in self._stretches(np.asarray(indices, np.int64)):
            found = corpus.tokens[start : start + length + 1]
            tokens[row, at : at + length], targets[row, at : at + length] = found[:-1], found[1:]
            if found.min() < 0 or found.max() >= limit:
                width = corpus.tokens.itemsize
                corpus.refuse_tokens(start * width, (length + 1) * width, self.vocab_size)
            if documents:
                first = corpus.starts_between(start, start + length + 1) - start
                bounds = np.concatenate([[0], first[first < length], [length]])
                positions[row, at : at + length] = np.arange(length) - np.repeat(bounds[:-1], np.diff(bounds))
                begins[row, at + first[first > 0] - 1] = True
        return TokenRows(tokens, targets, positions, begins) if documents else TokenRows(tokens, targets)

    def _stretches(self, indices: Ints) -> Iterator[tuple[int, int, IndexedTokens, int, int]]:
        """Row, place in it, corpus, first token there and length of each stretch of text that samples are made of."""
        corpora, nth = self.order.mixture.locate(indices - self.place.first)
        given = self._starts[corpora] + nth * self.seq_len
        rows, at = np.arange(len(indices)), np.zeros(len(indices), np.int64)
        while len(rows):
            here, units = corpora[rows], self._units[corpora[rows]]
            number, inside = np.divmod(given[rows] + at[rows], units)
            starts = self.order.nth(here, number) * units + inside
            lengths = np.minimum(units - inside, self.seq_len - at[rows])
            for row, corpus, start, length in zip(
                rows.tolist(), here.tolist(), starts.tolist(), lengths.tolist(), strict=True
            ):
                yield row, int(at[row]), self._corpus(corpus), start, length
            at[rows] += lengths
            rows = rows[at[rows] < self.seq_len]


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
