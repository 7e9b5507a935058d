"""Which corpus of a mixture the sample `i` is from: every corpus less than one sample off its share at every point.

Sample j of a corpus of share w, j = 1, 2, ..., must come among the run's samples numbered floor((j - 1) / w) to
ceil(j / w) - 1: while each does, no corpus is a whole sample off. Taking in each place the sample that must come
first, of those that may come already, keeps all of these windows (earliest deadline first; Tijdeman, "The chairman
assignment problem", 1980; Baruah et al., "Proportionate progress", 1996).

That order goes from place to place, so it is cut into blocks: `_cut` says how many samples of each corpus come before
a place from what comes before two others around it, and cuts in half what was cut, from the whole run down to a block.
Any place is found after some forty cuts, whatever comes before it; who reads on keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush, heappushpop

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ORDER = 3  # raise it when the same mixture would be read in another order
_WHOLE = 62  # shares are whole multiples of 2**-_WHOLE
_RUN = 50  # a run has less than 2**_RUN samples
_BLOCK = 16  # 2**_BLOCK samples are put in order together; their places fit 16 bits, which numpy sorts fastest
_KEPT = 4  # blocks in memory


def parts_of(weights: tuple[float, ...]) -> Ints:
    """Shares in 2**-62, which sum up to 1: each rounded down or up, those up that lose most otherwise."""
    ratios = [weight.as_integer_ratio() for weight in weights]
    common = max(below for _, below in ratios)  # powers of 2
    exact = [above * (common // below) for above, below in ratios]
    total = sum(exact)
    parts, lost = zip(*(divmod(weight << _WHOLE, total) for weight in exact), strict=True)
    found = np.array(parts, np.int64)
    by_loss = sorted(range(len(lost)), key=lambda corpus: (-lost[corpus], corpus))
    found[by_loss[: 2**_WHOLE - sum(parts)]] += 1
    return found


@dataclass(frozen=True)
class _Place:
    """What comes before a sample: `samples` of all corpora, `of_each` of each one."""

    samples: int
    of_each: Ints


@dataclass(frozen=True)
class _Block:
    """The samples from `first` on: the corpus of each, and how many of that corpus come before it."""

    first: int
    corpus: Ints
    nth: Ints


@dataclass(frozen=True)
class Mixture:
    """The corpora of a mixture, by weight.

    Args:
        weights: finite and above 0, in any unit.
    """

    weights: tuple[float, ...]
    _cuts: dict[int, _Place] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # the last one of each level
    _blocks: dict[int, _Block] = field(default_factory=dict, init=False, repr=False, compare=False)  # the last ones

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """The part of the samples that each corpus is to have; they sum up to 1."""
        weights = np.asarray(self.weights, np.float64) / max(self.weights)
        return weights / weights.sum()

    @cached_property
    def _parts(self) -> Ints:
        return parts_of(self.weights)

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Corpus of each sample, and how many samples of that corpus come before it; all of shape [k].

        Args:
            samples: numbers in the run, 0 <= sample < 2**50.
        """
        if len(self.weights) == 1:
            return np.zeros_like(samples), samples.copy()
        corpus, nth = np.empty_like(samples), np.empty_like(samples)
        numbers = samples >> _BLOCK
        waiting = np.arange(len(samples))
        while len(waiting):
            block = self._block(int(numbers[waiting[0]]))
            inside = numbers[waiting] == block.first >> _BLOCK
            here, waiting = waiting[inside], waiting[~inside]
            at = samples[here] - block.first
            corpus[here], nth[here] = block.corpus[at], block.nth[at]
        return corpus, nth

    def counts(self, samples: int) -> Ints:
        """How many of the first `samples` are of each corpus."""
        if len(self.weights) == 1:
            return np.array([samples])
        begin, _ = self._around(samples >> _BLOCK)
        inside = samples - begin.samples
        block = self._block(samples >> _BLOCK).corpus[:inside] if inside else np.zeros(0, np.int64)
        return begin.of_each + np.bincount(block, minlength=len(self.weights))

    def _block(self, number: int) -> _Block:
        block = self._blocks.get(number)
        if block is None:
            block = _in_order(self._parts, *self._around(number))
            for old in list(self._blocks)[: 1 - _KEPT]:
                self._blocks.pop(old, None)  # another thread may have been faster
            self._blocks[number] = block
        return block

    def _around(self, number: int) -> tuple[_Place, _Place]:
        """The begin of a block and its end."""
        corpora = len(self.weights)
        begin, end = _Place(0, np.zeros(corpora, np.int64)), _Place(2 * 2**_RUN, np.full(corpora, 2 * 2**_RUN))
        for level in reversed(range(_BLOCK, _RUN + 1)):
            middle = begin.samples + 2**level
            cut = self._cuts.get(level)
            if cut is None or cut.samples != middle:
                cut = self._cuts[level] = _cut(self._parts, begin, middle, end)
            begin, end = (begin, cut) if number << _BLOCK < middle else (cut, end)
        return begin, end


def _quotas(parts: Ints, samples: int) -> tuple[Ints, Ints]:
    """Each corpus's share of the first samples: whole samples, and the rest in 2**-_WHOLE."""
    rest = (parts * samples) & (2**_WHOLE - 1)  # exact: what is lost of the product are multiples of 2**64
    return np.rint(parts / 2**_WHOLE * samples - rest / 2**_WHOLE).astype(np.int64), rest


def _cut(parts: Ints, begin: _Place, middle: int, end: _Place) -> _Place:
    """What comes before the place `middle`, so that all windows can be kept on both of its sides.

    Each corpus has at most one sample whose window goes over the place. It comes before it where `begin` or `end` say
    so already; of the others, those come before it that must come first, as far as there is room for them: among those
    that may not come earlier than h places before the middle, there are at most as many as the shares of these
    samples before the middle, and what the other corpora's shares are of the h places, rounded up.

    Why there always is a choice: the shares themselves are one of fractions, with as much room left over as `begin`
    and `end`, chosen by the same rule, have taken or left too much. All conditions are on sets each of which holds the
    next, by first place and by last place: such conditions with whole bounds that fractions meet, whole numbers meet
    too. And of all choices with room, taking what must come first leaves the least to do in time afterwards.
    """
    whole, rest = _quotas(parts, middle)
    before = begin.of_each > whole
    free = np.flatnonzero((rest > 0) & ~before & (end.of_each > whole))
    wanted = middle - int(whole.sum()) - int(before.sum())
    must = -(-(2**_WHOLE - rest[free]) // parts[free])
    free = free[np.argsort(must, kind="stable")]
    early, room = _room(parts, rest, middle - begin.samples)
    order = np.argsort(early[free], kind="stable")
    of_each = whole + before
    of_each[free[_first_with_room(order, np.minimum(room[free[order]], wanted))]] += 1
    return _Place(middle, of_each)


def _room(parts: Ints, rest: Ints, places: int) -> tuple[Ints, Ints]:
    """For each corpus, how many places before the middle the window begins that goes over it; and how many of the
    samples whose windows begin there or later there is room for.

    Args:
        places: from the begin to the middle.
    """
    early = -(-rest // np.maximum(parts, 1))
    order = np.argsort(early, kind="stable")
    h = early[order]
    last = np.searchsorted(h, h, side="right") - 1  # of those whose windows begin at the same place
    late, others = np.cumsum(rest[order])[last], 2**_WHOLE - np.cumsum(parts[order])[last]
    about = np.cumsum(rest[order] / 2**_WHOLE)[last] + h * (others / 2**_WHOLE)
    fraction = (late + h * others) & (2**_WHOLE - 1)
    room = np.empty_like(early)
    room[order] = np.rint(about - fraction / 2**_WHOLE).astype(np.int64) + (fraction > 0)
    return early, np.where(early < places, room, len(parts))


def _first_with_room(order: Ints, room: Ints) -> list[int]:
    """The smallest of the numbers in `order`, at most as many of its begin as there is room for, at each of them.

    Args:
        room: for each number, growing.
    """
    taken: list[int] = []  # negative: the heap has the largest number first
    for number, most in zip(order.tolist(), room.tolist(), strict=True):
        if len(taken) < most:
            heappush(taken, -number)
        elif taken:
            heappushpop(taken, -number)
    return [-number for number in taken]


def _due(parts: Ints, rest: Ints, number: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Places until the share of a corpus has grown to `number` samples from `rest`, at most a block; and whether it is
    a whole number then."""
    places = np.ceil((number - rest / 2**_WHOLE) * (2**_WHOLE / parts))
    places = np.minimum(places, 2**_BLOCK).astype(np.int64)
    over = rest + parts * places - (number << _WHOLE)  # exact: the sum itself fits, whatever its parts lose
    places += (over < 0).astype(np.int64) - (over >= parts)
    over += np.where(over < 0, parts, np.where(over >= parts, -parts, 0))
    return np.minimum(places, 2**_BLOCK), over == 0


def _in_order(parts: Ints, begin: _Place, end: _Place) -> _Block:
    """The samples of a block: in each place the one that must come first, of those that may come already."""
    whole, rest = _quotas(parts, begin.samples)
    some = np.flatnonzero(end.of_each > begin.of_each)
    many = (end.of_each - begin.of_each)[some]
    firsts = np.cumsum(many) - many
    corpus = np.repeat(some, many)
    number = np.arange(len(corpus)) + np.repeat((begin.of_each - whole)[some] + 1 - firsts, many)
    must, exact = _due(parts[corpus], rest[corpus], number)
    may = np.empty_like(must)
    may[1:] = must[:-1] - ~exact[:-1]  # the window of the one before ends there, or one place later
    must_before, exact_before = _due(parts[some], rest[some], number[firsts] - 1)
    may[firsts] = np.maximum(must_before - ~exact_before, 0)
    by_must = np.argsort((must - 1).astype(np.uint16), kind="stable")
    corpus, number, may = corpus[by_must], number[by_must], may[by_must].astype(np.uint16)
    order = _earliest_first(np.argsort(may, kind="stable"), np.bincount(may, minlength=len(may)))
    return _Block(begin.samples, corpus[order], (number + whole[corpus] - 1)[order])


def _earliest_first(arriving: Ints, arrivals: Ints) -> Ints:
    """The smallest number in each place, of those that have arrived by then and were not taken before.

    Args:
        arriving: numbers in the order in which they arrive.
        arrivals: how many of them in each place.
    """
    waiting: list[int] = []
    taken: list[int] = []
    take, arrive = taken.append, iter(arriving.tolist()).__next__
    for many in arrivals.tolist():
        if many == 0:
            take(heappop(waiting))
        else:
            while many > 1:
                heappush(waiting, arrive())
                many -= 1
            take(heappushpop(waiting, arrive()))
    return np.array(taken)
