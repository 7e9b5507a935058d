"""Training rows of whole conversations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.corpus import Meta
from tplaunch.data.fitted import fit
from tplaunch.data.indexed import IndexedTokens, open_loss
from tplaunch.data.mixture import Ints
from tplaunch.data.order import SampleOrder
from tplaunch.data.packing import Rows, pack
from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Source

_OPEN = 64  # corpora that are held open, at three files each


class PackedBatch(NamedTuple):
    """Rows of conversations, all of shape [rows, seq_len].

    Args:
        tokens: int64; what is left of a row is filled up.
        loss: which tokens are targets: never the first of a conversation, and none that fills up.
        positions: each token's place in its conversation, or in what fills up; 0 where attention must not look back.
    """

    tokens: Ints
    loss: NDArray[np.bool_]
    positions: Ints


class PackedDataset:
    """Samples of `seq_len` tokens, conversations packed whole, from one corpus or a weighted blend.

    Which conversations share a row follows from their lengths alone (`pack`); which row comes when is `SampleOrder`'s
    matter.

    Args:
        sources: prefixes of prepared conversations, with weights.
        seq_len: tokens of a row.
        seed: of the order.
        shuffle: without it each corpus is read from its start, in order (validation).
        vocab_size: tokens of the model.

    Raises:
        TplaunchError: a corpus is missing, damaged, or has nothing to learn in rows of this length.
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
        self._corpus = lru_cache(_OPEN)(lambda number: _open(paths[number]))
        fitted = [self.rows_of(self._corpus(number)[0], seq_len) for number in range(len(paths))]
        self._rows = [rows for rows, _ in fitted]
        self._lengths = [lengths for _, lengths in fitted]
        metas = [Meta.read(path) for path in paths]
        self._filling = [meta.eod if meta else 0 for meta in metas]
        sizes = tuple(len(rows) for rows in self._rows)
        self.order = SampleOrder(sizes, tuple(source.weight for source in sources), seed, shuffle)

    @staticmethod
    def rows_of(corpus: IndexedTokens, seq_len: int) -> tuple[Rows, NDArray[np.int32]]:
        """The rows of a corpus, and the tokens that each conversation has in its row.

        Raises:
            TplaunchError: there is none.
        """
        lengths = np.frombuffer(fit(str(corpus.prefix), seq_len).lengths, np.int32)
        rows = pack(lengths, seq_len)
        if not len(rows):
            what = f"{corpus.prefix}: nothing is learned in the first {seq_len:,} tokens of any conversation"
            raise TplaunchError(Problem(what, fix="raise training.seq_len"))
        return rows, lengths

    def __len__(self) -> int:
        """Rows of all corpora, each counted once; `batch` goes on beyond, epoch after epoch."""
        return sum(self.order.sizes)

    def batch(self, indices: Ints) -> PackedBatch:
        """The rows with these numbers in the run, any numbers >= 0.

        Raises:
            TplaunchError: a token is negative, or beyond the vocabulary; its file and byte are named.
        """
        shape = (len(indices), self.seq_len)
        out = PackedBatch(np.empty(shape, np.int64), np.zeros(shape, np.bool_), np.empty(shape, np.int64))
        places = zip(*(found.tolist() for found in self.order.locate(indices)), strict=True)
        for row, (number, sample) in enumerate(places):
            corpus, loss = self._corpus(number)
            at = 0
            for conversation in self._rows[number][sample].tolist():
                length, start = int(self._lengths[number][conversation]), corpus.document_start(conversation)
                end = at + length
                out.tokens[row, at:end] = corpus.tokens[start : start + length]
                out.loss[row, at:end] = loss[start : start + length]
                out.loss[row, at] = False
                out.positions[row, at:end] = np.arange(length)
                self._check(corpus, out.tokens[row, at:end], start)
                at = end
            out.tokens[row, at:] = self._filling[number]
            out.positions[row, at:] = np.arange(self.seq_len - at)
        return out

    def _check(self, corpus: IndexedTokens, tokens: Ints, start: int) -> None:
        if tokens.min() < 0 or (self.vocab_size is not None and tokens.max() >= self.vocab_size):
            width = corpus.tokens.itemsize
            corpus.refuse_tokens(start * width, len(tokens) * width, self.vocab_size)


def _open(path: Path) -> tuple[IndexedTokens, NDArray[np.uint8]]:
    corpus = IndexedTokens.open(path)
    return corpus, open_loss(path, len(corpus.tokens))
