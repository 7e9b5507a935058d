"""Which corpus of a mixture the sample `i` is from: shares that follow the weights at every point of a run.

The corpora are the leaves of a binary tree. Of the first m samples of a node, its lighter child has round(m * p), its
share p of the node's weight, and the heavier child has the rest: each is at most half a sample off its own share of
the node, and off its share of the run by that and its part of what the node is off. So every count has a closed form,
that of any sample takes one step for each level of the tree, and no weight is too small.

A leaf of weight w is then at most `w/2 * (1/w + 1/v + ...)` samples off, over the nodes v between it and the root: a
tree is good where weights double from level to level.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ORDER = 2  # raise it when the same mixture would be read in another order; 1: whole quotas of every 1,000 samples
_FEW = 16  # corpora up to which trees are compared one by one
_KEPT = 40  # of the trees of fewer corpora, so many of the best are tried further
_ASIDE = (0, 1, 2, 3, 4, 6, 8, 16, 64)  # smallest corpora that get a tree of their own, whichever is best


@dataclass(frozen=True, eq=False)
class _Node:
    """A corpus, or two nodes: the lighter one first."""

    weight: float
    corpus: int = -1
    children: tuple[_Node, ...] = ()


def _join(a: _Node, b: _Node) -> _Node:
    return _Node(a.weight + b.weight, children=(a, b) if a.weight <= b.weight else (b, a))


def _bounds(tree: _Node) -> list[float]:
    """How many samples each corpus is off at most."""
    bounds, waiting = [], [(tree, 0.0)]
    while waiting:
        node, above = waiting.pop()
        if node.children:
            waiting += [(child, above + 1 / child.weight) for child in node.children]
        else:
            bounds.append(node.weight * above / 2)
    return bounds


def _badness(tree: _Node) -> tuple[float, float]:
    """The worst bound, then how many are near it."""
    bounds = _bounds(tree)
    return max(bounds), sum(bound**8 for bound in bounds)


def _tree(leaves: Sequence[_Node]) -> _Node:
    """A tree with small bounds; the same for the same weights."""
    falling = sorted(leaves, key=lambda leaf: -leaf.weight)
    if len(leaves) > _FEW:
        asides = [m for m in _ASIDE if 2 * m < len(leaves)]
        return min((_huffman_but(falling, aside) for aside in asides), key=lambda tree: max(_bounds(tree)))
    best = falling[:1]
    for leaf in falling[1:]:
        grown = [tree for known in best for tree in _with(known, leaf)]
        best = sorted(grown, key=_badness)[:_KEPT]
    return best[0]


def _with(tree: _Node, leaf: _Node) -> Iterator[_Node]:
    """The trees with one more leaf, at each place."""
    yield _join(tree, leaf)
    if tree.children:
        light, heavy = tree.children
        yield from (_join(grown, heavy) for grown in _with(light, leaf))
        yield from (_join(light, grown) for grown in _with(heavy, leaf))


def _huffman_but(falling: Sequence[_Node], aside: int) -> _Node:
    """Huffman's tree, and beside it another of the `aside` smallest, which would unbalance it."""
    many = _huffman(falling[: len(falling) - aside])
    return _join(many, _huffman(falling[-aside:])) if aside else many


def _huffman(leaves: Sequence[_Node]) -> _Node:
    number = count()
    heap = [(leaf.weight, next(number), leaf) for leaf in leaves]
    heapq.heapify(heap)
    while len(heap) > 1:
        node = _join(heapq.heappop(heap)[2], heapq.heappop(heap)[2])
        heapq.heappush(heap, (node.weight, next(number), node))
    return heap[0][2]


@dataclass(frozen=True)
class _Table:
    """The tree as arrays, parents before their children; leaves have -1 as children.

    Attributes:
        share: of the lighter child in the node.
        light, heavy: numbers of the children.
        corpus: of a leaf.
    """

    share: NDArray[np.float64]
    light: Ints
    heavy: Ints
    corpus: Ints


@dataclass(frozen=True)
class Mixture:
    """The corpora of a mixture, by weight.

    Args:
        weights: finite and above 0, in any unit.
    """

    weights: tuple[float, ...]

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """The part of the samples that each corpus is to have; they sum up to 1."""
        weights = np.asarray(self.weights, np.float64) / max(self.weights)
        return weights / weights.sum()

    @cached_property
    def _nodes(self) -> _Node:
        shares = np.maximum(self.shares, np.finfo(np.float64).tiny).tolist()
        return _tree([_Node(share, corpus) for corpus, share in enumerate(shares)])

    @cached_property
    def _table(self) -> _Table:
        nodes = [self._nodes]
        light, heavy = [], []
        for node in nodes:  # grows while it is read
            light.append(len(nodes) if node.children else -1)
            heavy.append(len(nodes) + 1 if node.children else -1)
            nodes += node.children
        share = [node.children[0].weight / node.weight if node.children else 0.0 for node in nodes]
        corpus = [node.corpus for node in nodes]
        return _Table(np.array(share), *(np.array(column, np.int64) for column in (light, heavy, corpus)))

    @property
    def off_by(self) -> float:
        """The most samples that any corpus can be off its share, at any point."""
        return max(_bounds(self._nodes))

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Corpus of each sample, and how many samples of that corpus come before it; all of shape [k].

        Args:
            samples: numbers in the run, 0 <= sample < 2**50.
        """
        table = self._table
        node, nth = np.zeros_like(samples), samples.copy()
        inner = np.flatnonzero(table.light[node] >= 0)
        while len(inner):
            at, m = node[inner], nth[inner]
            # The lighter child is the one to round: its share is at most 1/2, so its count steps by 0 or 1.
            before, after = (_rounded(m + step, table.share[at]) for step in (0, 1))
            lighter = after > before
            node[inner] = np.where(lighter, table.light[at], table.heavy[at])
            nth[inner] = np.where(lighter, before, m - before)
            inner = inner[table.light[node[inner]] >= 0]
        return table.corpus[node], nth

    def counts(self, samples: int) -> Ints:
        """How many of the first `samples` are of each corpus."""
        table = self._table
        of_node = np.zeros(len(table.share), np.int64)
        of_node[0] = samples
        level = np.array([0])
        while len(level := level[table.light[level] >= 0]):
            lighter = _rounded(of_node[level], table.share[level])
            of_node[table.light[level]], of_node[table.heavy[level]] = lighter, of_node[level] - lighter
            level = np.concatenate([table.light[level], table.heavy[level]])
        leaves = table.light < 0
        out = np.empty(len(self.weights), np.int64)
        out[table.corpus[leaves]] = of_node[leaves]
        return out


def _rounded(counts: Ints, shares: NDArray[np.float64]) -> Ints:
    return np.floor(counts * shares + 0.5).astype(np.int64)
