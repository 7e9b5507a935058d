"""The order of samples: every sample once an epoch, exact shares, no dependence on who asks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data.mixture import ORDER, Mixture
from tplaunch.data.order import SampleOrder, permute

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
        corpus, within = order.locate(np.arange(4000))
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


weight_lists = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40)


def off_shares(weights: Sequence[float], until: int, start: int = 0) -> float:
    """The most samples by which any corpus is off its share after any of the samples `start`..`until` - 1."""
    mixture = Mixture(tuple(weights))
    corpus, nth = mixture.locate(np.arange(start, until))
    worst = 0.0
    for c, share in enumerate(mixture.shares):
        mine = np.flatnonzero(corpus == c) + start
        numbers = nth[corpus == c]
        assert np.array_equal(numbers, mixture.counts(start)[c] + np.arange(len(mine)))  # none twice, none left out
        if len(mine):  # just before and just after each of its samples, and at the end
            ahead, behind = numbers + 1 - (mine + 1) * share, mine * share - numbers
            worst = max(worst, ahead.max(), behind.max())
        worst = max(worst, abs(mixture.counts(until)[c] - until * share))
    return worst


@settings(deadline=None, max_examples=60)
@given(weights=weight_lists, start=st.integers(0, 10**11))
def test_shares_follow_the_weights_at_every_point(weights: list[float], start: int) -> None:
    assert off_shares(weights, start + 3000, start) <= Mixture(tuple(weights)).off_by + 0.001


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3],
        [0.0006, 0.9994],
        [0.0015, 0.4, 0.5985],
        [1.0] * 33,
        [1.0] * 700,
        [1.0, *[1e-4] * 5000],
        [1 / n for n in range(1, 1001)],
        [*[0.6] * 4, *[0.53] * 3, 1e-7],
    ],
)
def test_shares_of_lists_that_people_write_are_within_one_sample(weights: list[float]) -> None:
    assert off_shares(weights, 30_000) <= 1.0 + 1e-6


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16, 17, 40, 300, 2000])
@pytest.mark.parametrize("power", [0, 1, 4])
def test_a_tree_of_any_weights_is_off_by_little(count: int, power: int) -> None:
    weights = np.random.default_rng(count).random(count) ** power + 1e-12
    assert Mixture(tuple(weights)).off_by < (1.2 if count > 4 else 1.0 + 1e-9)


def test_ten_thousand_corpora_have_their_shares_to_a_millionth() -> None:
    weights = tuple(np.random.default_rng(0).random(10_000))
    mixture, samples = Mixture(weights), 10**7
    assert np.abs(mixture.counts(samples) / samples - mixture.shares).max() < 1e-6
    begun = time.process_time()
    for step in range(100):
        mixture.locate(10**9 + 1024 * step + np.arange(1024))
    assert time.process_time() - begun < 2.0
    assert len(mixture.locate(np.array([10**12]))[0]) == 1  # any place at once


def test_a_small_weight_is_read_and_an_extreme_one_does_no_harm() -> None:
    assert Mixture((1.0, 1e-5)).counts(10**7).tolist() == [9_999_900, 100]
    assert Mixture((1.0, 1e-300, 5e-324)).counts(10**9).tolist() == [10**9, 0, 0]
    assert Mixture((1e308, 1e308)).counts(11).tolist() in ([5, 6], [6, 5])


def test_validation_reads_from_the_start() -> None:
    corpus, within = SampleOrder((5,), (1.0,), seed=9, shuffle=False).locate(np.arange(12))
    assert within.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    corpus, within = SampleOrder((900, 900), (1, 1), seed=9, shuffle=False).locate(np.arange(1000))
    for c in (0, 1):
        assert np.array_equal(within[corpus == c], np.arange(500))


def test_the_order_is_the_one_of_earlier_versions() -> None:
    """A run continued by a later version must go on in the same order: these numbers never change."""
    _, within = SampleOrder((1000,), (1.0,), seed=1234).locate(np.arange(2998, 3010))
    assert within.tolist() == [290, 198, 126, 482, 739, 578, 217, 955, 921, 385, 775, 735]


def test_the_order_of_a_mixture_changes_only_with_its_number() -> None:
    """Where these numbers must change, raise `ORDER`, so that no run goes on with other samples in silence."""
    corpus, within = SampleOrder((1000, 300), (0.7, 0.3), seed=1234).locate(np.arange(2998, 3010))
    assert ORDER == 2
    assert corpus.tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert within.tolist() == [8, 475, 362, 270, 954, 319, 159, 538, 845, 350, 19, 215]
    many = Mixture(tuple(1 / n for n in range(1, 41))).locate(np.arange(10**6, 10**6 + 10))[0]
    assert many.tolist() == [23, 1, 16, 20, 0, 6, 8, 2, 0, 5]
