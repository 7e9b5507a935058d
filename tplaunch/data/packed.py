"""Training rows of whole conversations, or of whole documents of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.cache import default_cache
from tplaunch.data.corpus import Meta
from tplaunch.data.indexed import IndexedTokens, open_loss
from tplaunch.data.mixture import Ints
from tplaunch.data.order import SampleOrder
from tplaunch.data.reading import Place
from tplaunch.data.remembered import remembered
from tplaunch.data.row_header import Kind
from tplaunch.data.row_index import RowIndex, key_of, ready_rows
from tplaunch.recipe.schema import Source

_OPEN = 64  # corpora that are held open, at four files each


class PackedBatch(NamedTuple):
    """Rows of documents, all of shape [rows, seq_len].

    Args:
        tokens: int64; what is left of a row is filled up.
        loss: which tokens are to be learned: none that fills up.
        positions: each token's place in its document, or in what fills up; 0 where attention must not look back.
    """

    tokens: Ints
    loss: NDArray[np.bool_]
    positions: Ints


class _Opened(NamedTuple):
    """A corpus.

    Args:
        loss: which tokens are to be learned; None: all.
        rows: that it fills.
    """

    corpus: IndexedTokens
    loss: NDArray[np.uint8] | None
    rows: RowIndex


class PackedDataset:
    """Samples of `seq_len` tokens, documents packed whole, from one corpus or a weighted blend.

    Which documents share a row follows from their lengths alone (`packing`), and lies in the cache (`row_index`); which
    row comes when is `SampleOrder`'s matter. Of those longer than a row, conversations lose their end, and text becomes
    several pieces.

    Args:
        kind: of all corpora.
        sources: prefixes of .bin/.idx pairs, with weights.
        seq_len: tokens of a row.
        seed: of the order.
        shuffle: without it each corpus is read from its start, in order (validation).
        vocab_size: tokens of the model.
        place: where in the run, and in its corpora, they begin, in rows of `seq_len`; default: where all begins.

    Raises:
        TplaunchError: a corpus is missing, damaged, or has nothing to learn in rows of this length; or its index cannot
            be written.
    """

    def __init__(
        self,
        kind: Kind,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
        place: Place | None = None,
    ) -> None:
        self.seq_len, self.vocab_size, self.place = seq_len, vocab_size, place
        paths = [Path(source.path) for source in sources]
        cache, keys = default_cache(), dict[int, bytes]()
        with remembered(cache) as sums:

            @lru_cache(_OPEN)
            def opened(number: int) -> _Opened:
                corpus = IndexedTokens.open(paths[number])
                loss = open_loss(corpus.prefix, len(corpus.tokens)) if kind == "chat" else None
                if number not in keys:
                    keys[number] = key_of(corpus.prefix, kind, seq_len, sums)
                return _Opened(corpus, loss, ready_rows(corpus, kind, seq_len, cache, keys[number]))

            sizes = tuple(len(opened(number).rows) for number in range(len(paths)))
        self._opened = opened
        metas = [Meta.read(path) for path in paths]
        self._filling = [meta.eod if meta else 0 for meta in metas]
        weights = tuple(source.weight for source in sources)
        self.order = SampleOrder(sizes, weights, seed, shuffle, place.numbers if place else None)

    def __len__(self) -> int:
        """Rows of all corpora, each counted once; `batch` goes on beyond, epoch after epoch."""
        return sum(self.order.sizes)

    def batch(self, indices: Ints) -> PackedBatch:
        """The rows with these numbers in the run, any numbers from where these begin on.

        Raises:
            TplaunchError: a token is negative, or beyond the vocabulary; its file and byte are named.
        """
        shape = (len(indices), self.seq_len)
        out = PackedBatch(np.empty(shape, np.int64), np.zeros(shape, np.bool_), np.empty(shape, np.int64))
        for row, (number, sample) in enumerate(zip(*(found.tolist() for found in self._locate(indices)), strict=True)):
            corpus, loss, rows = self._opened(number)
            at = 0
            for start, length in rows[sample]:
                end = at + length
                out.tokens[row, at:end] = corpus.tokens[start : start + length]
                out.loss[row, at:end] = True if loss is None else loss[start : start + length]
                out.positions[row, at:end] = np.arange(length)
                self._check(corpus, out.tokens[row, at:end], start)
                at = end
            out.tokens[row, at:] = self._filling[number]
            out.positions[row, at:] = np.arange(self.seq_len - at)
        return out

    def _locate(self, indices: Ints) -> tuple[Ints, Ints]:
        """Corpus and row of each sample."""
        if self.place is None:
            return self.order.locate(indices)
        corpus, nth = self.order.mixture.locate(indices - self.place.first)
        before = np.array(self.place.starts, np.int64) // self.seq_len
        return corpus, self.order.nth(corpus, before[corpus] + nth)

    def _check(self, corpus: IndexedTokens, tokens: Ints, start: int) -> None:
        if tokens.min() < 0 or (self.vocab_size is not None and tokens.max() >= self.vocab_size):
            width = corpus.tokens.itemsize
            corpus.refuse_tokens(start * width, len(tokens) * width, self.vocab_size)
