"""Attention out of pages, of sequences together, is that of each alone; and reads none but its own."""

from __future__ import annotations

import pytest
import torch

from tplaunch.model.attend import Attending, attend
from tplaunch.model.cache import BlockCache, Kept, Pages, Pass, StageCache

LENGTHS = [1, 15, 40, 16, 33]
KINDS = {
    "plain": (Attending(), False, 8),
    "window": (Attending(window=5), False, 8),
    "wide window": (Attending(window=39), False, 8),
    "softcap": (Attending(softcap=2.0, scale=0.3), False, 8),
    "sinks": (Attending(window=20), True, 8),
    "other values": (Attending(), False, 4),
}


def _drawn(length: int, value: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    sizes = ((4, 8), (2, 8), (2, value))
    return [torch.randn(length, 1, *size, generator=random, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_together_are_each_alone(kind: str) -> None:
    how, has_sinks, value = KINDS[kind]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if has_sinks else None
    whole = [_drawn(length + 2, value, length) for length in LENGTHS]  # two more come one after another
    expected = [attend(q, k, v, how, sinks=sinks) for q, k, v in whole]
    pages, cache, kept = Pages(30), BlockCache(), [Kept() for _ in LENGTHS]

    def run(which: list[int], begins: list[int], ends: list[int]) -> list[torch.Tensor]:
        counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
        for one, count in zip(which, counts, strict=True):
            kept[one].grow(count, pages)
        cache.now = Pass([kept[one] for one in which], counts, pages.capacity, torch.device("cpu"))
        parts = [[x[b:e] for x in whole[one]] for one, b, e in zip(which, begins, ends, strict=True)]
        q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        return list(cache.attend(q, k, v, how, sinks).split(counts))

    everyone = list(range(len(LENGTHS)))
    found = [run(everyone[:3], [0] * 3, LENGTHS[:3]), run(everyone[3:], [0] * 2, LENGTHS[3:])]
    for one, made in zip(everyone, [*found[0], *found[1]], strict=True):
        torch.testing.assert_close(made, expected[one][: LENGTHS[one]])
    more = run(everyone, LENGTHS, [length + 1 for length in LENGTHS])
    for one, length in enumerate(LENGTHS):
        torch.testing.assert_close(more[one], expected[one][length : length + 1])
    kept[2].end(pages)  # its pages are taken by others, and one goes on alone
    (alone,) = run([1], [LENGTHS[1] + 1], [LENGTHS[1] + 2])
    torch.testing.assert_close(alone, expected[1][LENGTHS[1] + 1 :])


def test_rotary_tables_are_made_once() -> None:
    made: list[int] = []

    def ropes(places: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        made.append(len(places))
        return places.double()[None, :, None, None, None].repeat(2, 1, 1, 1, 4), None, torch.ones(2, 1, 1, 1, 4)

    cache, pages, kept = StageCache(1, ropes), Pages(99), Kept()
    for count in (5, *[1] * 300):
        kept.grow(count, pages)
        cache.begin(Pass([kept], [count], pages.capacity, torch.device("cpu")))
        table, none, still = cache.ropes()
        assert table is not None and table[0, :, 0, 0, 0].tolist() == list(range(kept.length - count, kept.length))
        assert none is None and still is not None and still.shape[1] == 1
    assert made == [256, 514]


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_head_only_the_last_tokens_attend(kind: str) -> None:
    """Also when whole prompts are read; and one after the other they do as everywhere."""
    how, has_sinks, value = KINDS[kind]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if has_sinks else None
    whole = [_drawn(length, value, length) for length in LENGTHS]
    pages, cache, kept = Pages(30), BlockCache(ends=True), [Kept() for _ in LENGTHS]
    prompts = [length - 1 for length in LENGTHS[1:]]
    for counts, begins in ((prompts, [0] * 4), ([1] * 4, prompts)):
        for one, count in zip(kept, counts, strict=False):
            one.grow(count, pages)
        cache.now = Pass(kept[:4], counts, pages.capacity, torch.device("cpu"))
        parts = [[x[b : b + c] for x in one] for one, b, c in zip(whole[1:], begins, counts, strict=True)]
        q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        ends = [begin + count for begin, count in zip(begins, counts, strict=True)]
        expected = [attend(*one, how, sinks=sinks)[end - 1] for one, end in zip(whole[1:], ends, strict=True)]
        torch.testing.assert_close(cache.attend(q, k, v, how, sinks), torch.stack(expected))
        assert len(cache.needed(q)) == 4
