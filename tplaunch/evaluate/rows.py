"""Rows of tokens of which a model is to say how likely some are. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        tokens: int64 [n]; the last is only predicted, never read.
        first: the first token that is scored, at least 1: each after it is, too.
        positions: int64 [n], each token's place in its document; None: the row is one document.
    """

    tokens: NDArray[np.int64]
    first: int = 1
    positions: NDArray[np.int64] | None = None


class Rows(Protocol):
    """Rows that need not be held all at once."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each."""

    def __getitem__(self, number: int) -> Row: ...


class Tokens(Protocol):
    """Documents one after the other."""

    @property
    def tokens(self) -> NDArray[Any]: ...

    def starts_between(self, first: int, last: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class HeldTokens:
    """Documents one after the other, in memory.

    Args:
        tokens: of all.
        starts: places in it at which documents begin, ascending.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, corpus: Tokens) -> HeldTokens:
        """A copy of a corpus."""
        return cls(np.array(corpus.tokens), corpus.starts_between(0, len(corpus.tokens)))

    def starts_between(self, first: int, last: int) -> NDArray[np.int64]:
        """See `IndexedTokens.starts_between`."""
        begin, end = np.searchsorted(self.starts, (first, last))
        return self.starts[begin:end]


class Windows:
    """A corpus in windows that do not overlap: window i reads tokens i n to i n + n - 1, and predicts those one later.

    Each token is scored once, but for the first of the corpus, before which there is nothing. The last window may be
    shorter. These are the samples of training and validation (`tplaunch.data.dataset`), in order.

    Args:
        corpus: at least two tokens.
        size: n.
        documents: tell documents apart, as training with `training.document_mask` does.
    """

    def __init__(self, corpus: Tokens, size: int, *, documents: bool = False) -> None:
        self.corpus, self.size, self.documents = corpus, size, documents
        predicted = len(corpus.tokens) - 1
        whole, rest = divmod(predicted, size)
        self.lengths = [size + 1] * whole + [rest + 1] * (rest > 0)

    def __getitem__(self, number: int) -> Row:
        begin = number * self.size
        end = begin + self.lengths[number]
        tokens = np.asarray(self.corpus.tokens[begin:end], np.int64)
        if not self.documents:
            return Row(tokens)
        starts = self.corpus.starts_between(begin, end) - begin
        bounds = np.concatenate([[0], starts, [len(tokens)]])
        return Row(tokens, positions=np.arange(len(tokens)) - np.repeat(bounds[:-1], np.diff(bounds)))


class Given:
    """Rows that are held.

    Args:
        rows: (tokens, first that is scored) of each.
    """

    def __init__(self, rows: Sequence[tuple[Sequence[int], int]]) -> None:
        self.rows = rows
        self.lengths = [len(tokens) for tokens, _ in rows]

    def __getitem__(self, number: int) -> Row:
        tokens, first = self.rows[number]
        return Row(np.array(tokens, np.int64), first)


def passes(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Which rows go through the model together: such of about one length, which together have so many tokens at most.

    Args:
        lengths: of the rows.
        tokens: of one pass, padding and all, where a row alone has not more.
    """
    found: list[list[int]] = []
    most = 0  # rows of the last pass
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        if not found or len(found[-1]) >= most:
            found.append([])
            most = max(1, tokens // lengths[number])
        found[-1].append(number)
    return found
