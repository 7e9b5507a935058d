"""The order of samples: every sample once an epoch, exact shares, no dependence on who asks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import permutations
from math import factorial, lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data.mixture import ORDER, Mixture, _due
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


weight_lists = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40) | st.lists(
    st.integers(1, 12), min_size=1, max_size=40
)


def off_shares(weights: Sequence[float], until: int, start: int = 0) -> Fraction:
    """The most samples by which any corpus is off its share after any of the samples `start`..`until` - 1; exact."""
    mixture = Mixture(tuple(weights))
    exact = [Fraction(weight) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    whole = sum(parts)
    read = mixture.counts(start).tolist()
    worst = max(abs(count * whole - start * part) for count, part in zip(read, parts, strict=True))
    corpus, nth = mixture.locate(np.arange(start, until))
    for sample, c, number in zip(range(start, until), corpus.tolist(), nth.tolist(), strict=True):
        assert number == read[c]  # none twice, none left out
        worst = max(worst, sample * parts[c] - number * whole, (number + 1) * whole - (sample + 1) * parts[c])
        read[c] += 1
    assert mixture.counts(until).tolist() == read
    # A corpus is furthest off just before or after its own samples, or at the end.
    worst = max(worst, *(abs(count * whole - until * part) for count, part in zip(read, parts, strict=True)))
    return Fraction(worst, whole)


def rounding(until: int) -> Fraction:
    """What shares, multiples of 2**-62, can make of `until` samples more or less."""
    return Fraction(until, 2**62)


@settings(deadline=None, max_examples=40)
@given(
    weights=weight_lists, start=st.integers(0, 10**11) | st.integers(0, 10**6).map(lambda n: max(0, n * 2**16 - 900))
)
def test_shares_follow_the_weights_at_every_point(weights: list[float], start: int) -> None:
    assert off_shares(weights, start + 2000, start) <= 1 + rounding(start + 2000)


@settings(deadline=None, max_examples=60)
@given(weights=weight_lists, start=st.integers(0, 3000) | st.integers(0, 10**12))
def test_shares_follow_the_weights_wherever_the_run_is_cut(weights: list[float], start: int) -> None:
    """Blocks of two samples, so that the counts of every second place come from cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tplaunch.data.mixture._BLOCK", 1)
        assert off_shares(weights, start + 150, start) <= 1 + rounding(start + 150)


@pytest.mark.parametrize("seed", range(8))
def test_many_corpora_of_all_sizes_are_cut_right(seed: int) -> None:
    """Weights as in crowded time tables, where a cut that looks at deadlines alone, or at none, fails."""
    drawn = np.random.default_rng(seed)
    weights = [*drawn.integers(1, 4, 30).tolist(), *(drawn.random(200) ** 4 / 50 + 1e-7).tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tplaunch.data.mixture._BLOCK", 3)
        assert off_shares(weights, 1500) <= 1 + rounding(1500)


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3],
        [0.0006, 0.9994],
        [0.0015, 0.4, 0.5985],
        [1] * 33,
        [1] * 700,
        [1] * 10_000,
        [1, *[1e-4] * 5000],
        [1, *[1e-12] * 50],
        [1 / n for n in range(1, 1001)],
        [*[0.6] * 4, *[0.53] * 3, 1e-7],
        [0.5, 0.25, 0.25 - 1e-9, 1e-9],
        np.random.default_rng(0).random(10_000).tolist(),
    ],
)
@pytest.mark.parametrize("start", [0, 2**16 - 12_000, 123_456_789_012])
def test_shares_of_lists_that_people_write_are_within_one_sample(weights: list[float], start: int) -> None:
    assert off_shares(weights, start + 24_000, start) <= 1


@pytest.mark.parametrize("weights", [[5, 3, 2], [4, 3, 1], [2, 1, 1], [1, 1]])
def test_no_corpus_is_a_whole_sample_off(weights: list[int]) -> None:
    """Where a share is a whole number, the next sample must not come one place before."""
    assert off_shares(weights, 500) < 1


def test_a_sample_is_due_where_exact_arithmetic_says() -> None:
    drawn = np.random.default_rng(0)
    bits = drawn.integers(1, 14, 20_000)
    parts = (1 + drawn.integers(0, 2**bits - 1)) << (62 - bits)  # shares of which some samples are a whole number
    parts[::2] += drawn.integers(0, 2**40, 10_000)
    rests = parts * drawn.integers(0, 2**13, 20_000) & (2**62 - 1)
    numbers = drawn.integers(1, 2000, 20_000)
    found = zip(*(array.tolist() for array in (parts, rests, numbers, *_due(parts, rests, numbers))), strict=True)
    seen = set()
    for part, rest, number, places, exact in found:
        until = -(-((number << 62) - rest) // part)
        if (until - 2**16) * part < 2**62:  # its window begins within the block
            assert places == min(until, 2**16)
        if until < 2**16:
            assert exact == (until * part == (number << 62) - rest)
            seen.add(exact)
    assert seen == {True, False}


def test_any_place_is_found_as_by_reading_up_to_it() -> None:
    weights = tuple(np.random.default_rng(1).random(300).tolist())
    read, samples = Mixture(weights), 5 * 2**16
    corpus, nth = (
        np.concatenate(parts) for parts in zip(*map(read.locate, np.array_split(np.arange(samples), 50)), strict=True)
    )
    places = np.random.default_rng(2).permutation(samples)[:20_000]
    sought = Mixture(weights).locate(places)
    assert np.array_equal(sought[0], corpus[places])
    assert np.array_equal(sought[1], nth[places])
    for place in (0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 - 7, samples):
        assert np.array_equal(Mixture(weights).counts(place), np.bincount(corpus[:place], minlength=300))


def test_threads_may_share_a_mixture() -> None:
    weights = tuple(np.random.default_rng(1).random(20).tolist())
    starts = np.random.default_rng(3).integers(0, 40, 60) * 2**16 - 50
    one, shared = Mixture(weights), Mixture(weights)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: shared.locate(np.maximum(0, start) + np.arange(100)), starts))
    for start, (corpus, nth) in zip(starts, found, strict=True):
        expected = one.locate(np.maximum(0, start) + np.arange(100))
        assert np.array_equal(corpus, expected[0])
        assert np.array_equal(nth, expected[1])


def test_ten_thousand_corpora_have_their_shares_to_a_millionth() -> None:
    weights = tuple(np.random.default_rng(0).random(10_000).tolist())
    mixture, samples = Mixture(weights), 10**7
    assert np.abs(mixture.counts(samples) / samples - mixture.shares).max() < 1e-6
    begun = time.process_time()
    for step in range(100):
        mixture.locate(10**9 + 1024 * step + np.arange(1024))
    assert len(mixture.locate(np.array([2**50 - 1]))[0]) == 1  # any place at once
    assert time.process_time() - begun < 5.0


def test_a_small_weight_is_read_and_an_extreme_one_does_no_harm() -> None:
    assert Mixture((1.0, 1e-5)).counts(10**7)[1] in (99, 100)  # 99.999
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
    _, within = SampleOrder((1024,), (1.0,), seed=1234).locate(np.arange(2998, 3010))  # just as many as ten bits hold
    assert within.tolist() == [961, 507, 213, 898, 695, 101, 749, 814, 625, 37, 804, 914]


def test_the_order_of_a_mixture_changes_only_with_its_number() -> None:
    """Where these numbers must change, raise `ORDER`, so that no run goes on with other samples in silence."""
    corpus, within = SampleOrder((1000, 300), (0.7, 0.3), seed=1234).locate(np.arange(2998, 3010))
    assert ORDER == 3
    assert corpus.tolist() == [1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert within.tolist() == [8, 475, 362, 954, 270, 319, 538, 159, 845, 350, 19, 215]
    many = Mixture(tuple(1 / n for n in range(1, 41))).locate(np.arange(10**6, 10**6 + 10))[0]
    assert many.tolist() == [2, 3, 0, 4, 5, 34, 0, 1, 16, 11]
