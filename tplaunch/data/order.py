"""The order of training samples: sample `i` of a run is a pure function of (seed, i, corpora).

Nothing is stored and nothing depends on the topology: any rank computes the place of any sample
at once, so starting, resuming and changing the number of ranks need no index files.

Shuffling is a keyed bijection on [0, n): a Feistel network over an even number of bits that
holds n, with cycle walking (apply it again until the value is below n; Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002). The round function and the keys come from the
SplitMix64 finalizer (Steele et al., 2014). It is for mixing, not for secrecy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_Words = NDArray[np.uint64]

BLEND_BLOCK = 1000  # samples in which each corpus of a blend has its exact share: weights count to 1/1000
_ROUNDS = 8
_MIN_HALF_BITS = 3  # with fewer, the round functions are too few to reach all orders of 5 samples evenly
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: _Words) -> _Words:
    """SplitMix64's finalizer; a bijection on 64 bits. Products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int | Ints) -> _Words:
    """A 64-bit key for each element of the broadcast parts, such as (seed, corpus, epoch)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix((key ^ np.atleast_1d(np.asarray(part)).astype(np.uint64)) + _GOLDEN)
    return key


def permute(x: Ints, n: int, key: _Words) -> Ints:
    """Images of `x` under the bijection on [0, n) that `key` chooses.

    Args:
        x: values in [0, n), shape [k].
        n: size of the domain, 1 <= n < 2**62.
        key: uint64, shape [k] or [1]; one key is one bijection.
    """
    if n == 1:
        return np.zeros_like(x)
    half = max(_MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    out = x.astype(np.uint64)
    keys = np.broadcast_to(key, out.shape)
    walking = np.arange(len(out))
    while len(walking):
        value, round_key = out[walking], keys[walking]
        left, right = value >> shift, value & mask
        for _ in range(_ROUNDS):
            round_key = _mix(round_key + _GOLDEN)
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value = (left << shift) | right
        out[walking] = value
        walking = walking[value >= np.uint64(n)]
    return out.astype(np.int64)


def quotas(weights: Sequence[float], block: int = BLEND_BLOCK) -> Ints:
    """Samples of each corpus in a block: `block` shared out by weight, by largest remainder.

    Raises:
        ValueError: a weight is so small that its corpus would never be read.
    """
    shares = np.asarray(weights, np.float64)
    shares = shares / shares.sum() * block
    counts = np.floor(shares).astype(np.int64)
    # Ties go to the earlier corpus; rounding keeps 0.29 * 1000 = 290.00000000000006 from mattering.
    remainders = np.round(shares - counts, 9)
    counts[np.argsort(-remainders, kind="stable")[: block - counts.sum()]] += 1
    if (counts == 0).any():
        raise ValueError(f"a weight is so small against the others that its corpus has no sample in {block}")
    return counts


@dataclass(frozen=True)
class SampleOrder:
    """Which sample of which corpus is sample `i` of the run.

    A blend is cut into blocks of `BLEND_BLOCK` samples; each corpus has its quota of every block, at
    places that a permutation of the block's own chooses. A corpus is read epoch after epoch, each epoch
    every sample once, in an order of the epoch's own.

    Args:
        sizes: samples of each corpus, each at least 1.
        weights: share of each corpus.
        seed: the run's seed, 0 <= seed < 2**63.
        shuffle: without it each corpus is read from its start, in order (validation).
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool = True

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Corpus number and sample number within it, of each global sample number; all of shape [k]."""
        samples = np.asarray(samples, np.int64)
        corpus, nth = self._blend(samples)
        within = np.empty_like(nth)
        for c, size in enumerate(self.sizes):
            mine = corpus == c
            epoch, at = np.divmod(nth[mine], size)
            within[mine] = permute(at, size, _key(self.seed, c + 1, epoch)) if self.shuffle else at
        return corpus, within

    def _blend(self, samples: Ints) -> tuple[Ints, Ints]:
        """Corpus of each sample, and how many samples of that corpus come before its place."""
        if len(self.sizes) == 1:
            return np.zeros_like(samples), samples
        counts = quotas(self.weights)
        ends = np.cumsum(counts)
        block, at = np.divmod(samples, BLEND_BLOCK)
        slot = permute(at, BLEND_BLOCK, _key(self.seed, 0, block))
        corpus = np.searchsorted(ends, slot, side="right").astype(np.int64)
        return corpus, block * counts[corpus] + slot - (ends - counts)[corpus]
