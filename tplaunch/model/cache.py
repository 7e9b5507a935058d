"""What attention keeps of the tokens before, so that generating one more costs one token's work: keys and values in
pages of some tokens, taken as sequences grow and given back as they end (Kwon et al. 2023, arXiv 2309.06180).

Every rank counts pages alike; each block has its own tensors, in which a page has the same number.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tplaunch.model.attend import Attending, attend
from tplaunch.model.attend_rows import attend_rows
from tplaunch.spec.pages import PAGE, pages_for


class Pages:
    """Which pages are whose.

    Args:
        most: pages that there may be.

    Attributes:
        capacity: pages that there are: what tensors hold. It grows with need, by a quarter or more.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.capacity = 0
        self._free: list[int] = []  # a heap: the lowest first, so that those of one sequence alone follow each other

    @property
    def taken(self) -> int:
        """Pages that some sequence has."""
        return self.capacity - len(self._free)

    def take(self) -> int:
        """A page that is free.

        Raises:
            ValueError: all are taken.
        """
        if not self._free:
            if self.capacity == self.most:
                raise ValueError(f"a cache of {self.most} pages of {PAGE} tokens has no room for more")
            first, self.capacity = self.capacity, min(self.most, max(8, self.capacity + -(-self.capacity // 4)))
            self._free = list(range(first, self.capacity))
        return heapq.heappop(self._free)

    def give(self, page: int) -> None:
        """Give back a page."""
        heapq.heappush(self._free, page)


@dataclass
class Kept:
    """A sequence's tokens in the cache.

    Args:
        pages: in which they are, in order.
        length: how many they are.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0

    def grow(self, count: int, pages: Pages) -> None:
        """Take the pages that further tokens need.

        Raises:
            ValueError: there are none, or several tokens come after others.
        """
        if self.length and count > 1:
            raise ValueError("after the first pass tokens come one at a time")
        self.length += count
        while len(self.pages) < pages_for(self.length):
            self.pages.append(pages.take())

    def end(self, pages: Pages) -> None:
        """Give back all."""
        for page in self.pages:
            pages.give(page)
        self.pages, self.length = [], 0


class Pass:
    """The tokens of one pass through the model, of one sequence after the other, and where their sequences are kept.

    Args:
        kept: the sequences, grown by these tokens already.
        counts: tokens of each: all it has, or one.
        capacity: pages that there are.
        device: of the tensors.

    Attributes:
        places: int64 [tokens], each token's place in its sequence.
        slots: int64 [tokens], its place in the pages of all.
        last: int64 [sequences], the last token of each sequence in this pass.
    """

    def __init__(self, kept: Sequence[Kept], counts: Sequence[int], capacity: int, device: torch.device) -> None:
        self.counts = list(counts)
        self.capacity = capacity
        self.lengths = [sequence.length for sequence in kept]
        self.one_each = all(count == 1 for count in counts)
        self._pages = [list(sequence.pages) for sequence in kept]
        places = [
            place for length, count in zip(self.lengths, counts, strict=True) for place in range(length - count, length)
        ]
        owners = [pages for pages, count in zip(self._pages, counts, strict=True) for _ in range(count)]
        slots = [pages[place // PAGE] * PAGE + place % PAGE for pages, place in zip(owners, places, strict=True)]
        self.places, self.slots = torch.tensor([places, slots], device=device).unbind(0)
        self.last = torch.tensor(self.counts, device=device).cumsum(0) - 1
        self._tables: dict[int | None, tuple[Tensor, Tensor]] = {}

    def whole(self) -> slice | None:
        """The slots of the only sequence, where its pages follow each other."""
        if len(self._pages) > 1:
            return None
        (pages,), (length,) = self._pages, self.lengths
        if pages != list(range(pages[0], pages[0] + len(pages))):
            return None
        return slice(pages[0] * PAGE, pages[0] * PAGE + length)

    def table(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The pages that each sequence's last token sees, int64 [sequences * pages], and which of their tokens it
        does, bool [sequences, pages * tokens of one]; made once for all blocks with this window."""
        if window not in self._tables:
            first = [0 if window is None else max(0, length - window) for length in self.lengths]
            seen = [pages[begin // PAGE :] for pages, begin in zip(self._pages, first, strict=True)]
            longest = max(map(len, seen))
            table = torch.tensor([[*pages, *[0] * (longest - len(pages))] for pages in seen])
            skipped = torch.tensor(
                [[begin // PAGE * PAGE, begin, end] for begin, end in zip(first, self.lengths, strict=True)]
            )
            places = torch.arange(longest * PAGE) + skipped[:, :1]
            mask = (places >= skipped[:, 1:2]) & (places < skipped[:, 2:])
            self._tables[window] = table.flatten().to(self.slots.device), mask.to(self.slots.device)
        return self._tables[window]


class BlockCache:
    """Keys and values of one block, [pages, tokens of one, kv heads, head_dim] each."""

    def __init__(self) -> None:
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self.now: Pass | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attending, sinks: Tensor | None) -> Tensor:
        """Keep keys and values of the tokens of a pass, [tokens, 1, kv heads, head_dim], and attend with each of its
        sequences to what is kept of it.

        Args:
            q: [tokens, 1, heads, head_dim].
            sinks: see `tplaunch.model.attend.attend`.

        Returns:
            [tokens, 1, heads * d of v].
        """
        now = self.now
        assert now is not None
        self._k, self._v = _grown(self._k, k, now.capacity), _grown(self._v, v, now.capacity)
        for kept, new in ((self._k, k), (self._v, v)):
            kept.flatten(0, 1).index_copy_(0, now.slots, new[:, 0])
        if not now.one_each:  # these are all tokens of their sequences
            parts = zip(*(x.split(now.counts) for x in (q, k, v)), strict=True)
            return torch.cat([attend(queries, keys, values, how, sinks=sinks) for queries, keys, values in parts])
        whole = now.whole()
        if whole is not None:
            keys, values = (x.flatten(0, 1)[whole, None] for x in (self._k, self._v))
            return attend(q, keys, values, how, sinks=sinks, first_query=len(keys) - 1)
        table, seen = now.table(how.window)
        keys, values = (x.index_select(0, table).view(len(seen), -1, *x.shape[2:]) for x in (self._k, self._v))
        return attend_rows(q[:, 0], keys, values, seen, how, sinks).unsqueeze(1)


def _grown(kept: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    """A block's tensor with room for as many pages; zeros, since what no query sees is multiplied with nought."""
    if kept is not None and len(kept) >= capacity:
        return kept
    grown = new.new_zeros(capacity, PAGE, *new.shape[2:])
    if kept is not None:
        grown[: len(kept)] = kept
    return grown


class StageCache:
    """The caches of a stage's blocks, and the rotary tables of the places that were asked for.

    Args:
        blocks: how many.
        ropes: makes the tables of some places, int64 [s].
    """

    def __init__(self, blocks: int, ropes: Callable[[Tensor], tuple[Tensor | None, ...]]) -> None:
        self.blocks = [BlockCache() for _ in range(blocks)]
        self._make, self._known = ropes, 0
        self._tables: tuple[Tensor | None, ...] = ()

    def begin(self, now: Pass) -> None:
        """Say what the next pass is."""
        for block in self.blocks:
            block.now = now

    @property
    def now(self) -> Pass:
        """What the pass is."""
        found = self.blocks[0].now
        assert found is not None
        return found

    def ropes(self) -> list[Tensor | None]:
        """The rotary tables of the tokens of this pass; those of all places up to twice the farthest are made once."""
        now = self.now
        if max(now.lengths) > self._known:
            self._known = 2 * max(*now.lengths, 128)
            self._tables = self._make(torch.arange(self._known, device=now.places.device))
        # Layers that turn nothing have one row for all.
        return [t if t is None or t.shape[1] == 1 else t.index_select(1, now.places) for t in self._tables]
