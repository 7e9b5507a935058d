"""The order of training samples: sample `i` of a run is a pure function of (seed, i, corpora).

Nothing is stored and nothing depends on the topology: any rank computes the place of any sample
at once, so starting, resuming and changing the number of ranks need no index files.

Shuffling is a keyed bijection on [0, n): a Feistel network over an even number of bits that
holds n, with cycle walking (apply it again until the value is below n; Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002). The round function and the keys come from the
SplitMix64 finalizer (Steele et al., 2014). It is for mixing, not for secrecy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.mixture import Ints, Mixture

_Words = NDArray[np.uint64]

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


def permute(x: Ints, n: int | Ints, key: _Words) -> Ints:
    """Images of `x` under the bijection on [0, n) that `key` chooses.

    Args:
        x: values in [0, n), shape [k].
        n: size of the domain, 1 <= n < 2**62; one, or one for each value.
        key: uint64, shape [k] or [1]; one key is one bijection.
    """
    sizes, inverse = np.unique(np.broadcast_to(n, x.shape), return_inverse=True)
    halves = [max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2) for size in sizes.tolist()]
    shifts, limits = np.array(halves, np.uint64)[inverse], sizes.astype(np.uint64)[inverse]
    masks = (np.uint64(1) << shifts) - np.uint64(1)
    out = x.astype(np.uint64)
    keys = np.broadcast_to(key, out.shape)
    walking = np.flatnonzero(limits > 1)
    while len(walking):
        value, round_key, shift, mask = (array[walking] for array in (out, keys, shifts, masks))
        left, right = value >> shift, value & mask
        for _ in range(_ROUNDS):
            round_key = _mix(round_key + _GOLDEN)
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value = (left << shift) | right
        out[walking] = value
        walking = walking[value >= limits[walking]]
    return out.astype(np.int64)


@dataclass(frozen=True)
class SampleOrder:
    """Which sample of which corpus is sample `i` of the run.

    Which corpus of a mixture comes when is `Mixture`'s matter. A corpus is read epoch after epoch, each epoch
    every sample once, in an order of the epoch's own.

    Args:
        sizes: samples of each corpus, each at least 1.
        weights: share of each corpus.
        seed: the run's seed, 0 <= seed < 2**63.
        shuffle: without it each corpus is read from its start, in order (validation).
        numbers: of each corpus in the run, which its order hangs on; default: 0, 1, 2, ...
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool = True
    numbers: tuple[int, ...] | None = None

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Corpus number and sample number within it, of each global sample number; all of shape [k]."""
        corpus, nth = self.mixture.locate(np.asarray(samples, np.int64))
        return corpus, self.nth(corpus, nth)

    def nth(self, corpus: Ints, nth: Ints) -> Ints:
        """Which sample of a corpus is the one that it gives after `nth` others, over all epochs; of shape [k]."""
        sizes = self._sizes[corpus]
        epoch, at = np.divmod(nth, sizes)
        return permute(at, sizes, _key(self.seed, self._keys[corpus], epoch)) if self.shuffle else at

    @cached_property
    def _sizes(self) -> Ints:
        return np.array(self.sizes, np.int64)

    @cached_property
    def _keys(self) -> Ints:
        return np.array(range(len(self.sizes)) if self.numbers is None else self.numbers, np.int64) + 1

    @cached_property
    def mixture(self) -> Mixture:
        """Which corpus comes when."""
        return Mixture(self.weights)
