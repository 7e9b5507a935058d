"""The order of samples: every sample once an epoch, exact shares, no dependence on who asks."""

from __future__ import annotations

from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data.order import BLEND_BLOCK, SampleOrder, permute, quotas

seeds = st.integers(0, 2**63 - 1)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int) -> None:
    image = permute(np.arange(n), n, np.array([key], np.uint64))
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2**40, 2**62 - 1), key=st.integers(0, 2**64 - 1))
def test_permute_of_a_huge_domain_stays_inside_and_apart(n: int, key: int) -> None:
    image = permute(np.arange(n - 1000, n), n, np.array([key], np.uint64))
    assert image.min() >= 0
    assert image.max() < n
    assert len(np.unique(image)) == 1000


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_every_order_of_a_small_corpus_is_as_likely(n: int) -> None:
    """Chi-square over all n! orders of 60,000 epochs; a fixed seed, so no luck is involved."""
    epochs = 60000
    order = SampleOrder((n,), (1.0,), seed=5)
    _, within = order.locate(np.arange(n * epochs))
    codes = within.reshape(epochs, n) @ (n ** np.arange(n))
    expected = epochs / factorial(n)
    counts = [np.count_nonzero(codes == np.dot(p, n ** np.arange(n))) for p in permutations(range(n))]
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    freedom = factorial(n) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_places_and_samples_are_unrelated_in_a_large_corpus() -> None:
    """Counts in a 20 x 20 grid of (place, sample) are as of independent numbers; neighbours are not kept."""
    n = 100_000
    image = permute(np.arange(n), n, np.array([1], np.uint64))
    grid = np.histogram2d(np.arange(n), image, bins=20)[0]
    chi_square = ((grid - n / 400) ** 2 / (n / 400)).sum()
    assert abs(chi_square - 361) < 5 * np.sqrt(2 * 361)
    assert np.count_nonzero(np.abs(np.diff(image)) == 1) < 20


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 500), seed=seeds, epochs=st.integers(1, 4))
def test_each_epoch_reads_every_sample_once(n: int, seed: int, epochs: int) -> None:
    corpus, within = SampleOrder((n,), (1.0,), seed).locate(np.arange(n * epochs))
    assert not corpus.any()
    for epoch in within.reshape(epochs, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))


def test_epochs_seeds_and_corpora_have_orders_of_their_own() -> None:
    first = SampleOrder((1000, 1000), (1, 1), seed=1)
    second = SampleOrder((1000, 1000), (1, 1), seed=2)
    orders = []
    for order in (first, second):
        corpus, within = order.locate(np.arange(4 * BLEND_BLOCK))
        for c in (0, 1):
            orders += [within[corpus == c][:1000], within[corpus == c][1000:]]
    assert len({tuple(order) for order in orders}) == 8


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    seed=seeds,
    start=st.integers(0, 10**12),
    ranks=st.sampled_from([1, 2, 3, 8]),
    shuffle=st.booleans(),
)
def test_the_order_does_not_depend_on_who_asks(
    sizes: list[int], seed: int, start: int, ranks: int, shuffle: bool
) -> None:
    weights = tuple(range(1, len(sizes) + 1))
    order = SampleOrder(tuple(sizes), weights, seed, shuffle)
    samples = start + np.arange(16)
    whole = order.locate(samples)
    for rank in range(ranks):
        mine = order.locate(samples[rank::ranks])
        assert np.array_equal(mine[0], whole[0][rank::ranks])
        assert np.array_equal(mine[1], whole[1][rank::ranks])
    one_by_one = [order.locate(samples[i : i + 1]) for i in range(16)]
    assert [int(c[0]) for c, _ in one_by_one] == whole[0].tolist()


@settings(deadline=None, max_examples=40)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), block=st.integers(0, 10**9), seed=seeds)
def test_each_block_of_a_blend_holds_the_exact_quotas(weights: list[float], block: int, seed: int) -> None:
    expected = quotas(weights)
    exact = np.array(weights) / sum(weights) * BLEND_BLOCK
    assert expected.sum() == BLEND_BLOCK
    assert (np.abs(expected - exact) < 1).all()
    order = SampleOrder((7,) * len(weights), tuple(weights), seed)
    corpus, _ = order.locate(block * BLEND_BLOCK + np.arange(BLEND_BLOCK))
    assert np.array_equal(np.bincount(corpus, minlength=len(weights)), expected)


def test_quotas_by_hand() -> None:
    assert quotas([0.7, 0.3]).tolist() == [700, 300]
    assert quotas([0.29, 0.71]).tolist() == [290, 710]
    assert quotas([1, 1, 1]).tolist() == [334, 333, 333]
    assert quotas([5, 3, 1], block=10).tolist() == [6, 3, 1]


def test_a_weight_that_would_never_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample in 1000"):
        quotas([1.0, 1e-5])


def test_a_blend_reads_each_corpus_evenly() -> None:
    """70/30 over corpora of 10 and 7 samples: after any number of blocks, samples of a corpus differ by one at most."""
    corpus, within = SampleOrder((10, 7), (0.7, 0.3), seed=3).locate(np.arange(5 * BLEND_BLOCK))
    for c in (0, 1):
        counts = np.bincount(within[corpus == c])
        assert counts.max() - counts.min() <= 1


def test_validation_reads_from_the_start() -> None:
    corpus, within = SampleOrder((5,), (1.0,), seed=9, shuffle=False).locate(np.arange(12))
    assert within.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    corpus, within = SampleOrder((900, 900), (1, 1), seed=9, shuffle=False).locate(np.arange(BLEND_BLOCK))
    for c in (0, 1):
        assert np.array_equal(np.sort(within[corpus == c]), np.arange(500))


def test_the_order_is_the_one_of_earlier_versions() -> None:
    """A run continued by a later version must go on in the same order: these numbers never change."""
    corpus, within = SampleOrder((1000, 300), (0.7, 0.3), seed=1234).locate(np.arange(2998, 3010))
    assert corpus.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert within.tolist() == [774, 31, 850, 86, 567, 756, 231, 318, 602, 890, 159, 60]
