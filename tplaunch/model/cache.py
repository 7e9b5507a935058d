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

    def read(self, kept: Sequence[Tensor], window: int | None) -> tuple[list[Tensor], Tensor | None]:
        """What the last token of each sequence sees.

        Args:
            kept: [kv heads, pages, tokens of one, d] each.

        Returns:
            [kv heads, sequences, places, d] each, and bool [sequences, places], which of them it does not see; None
            where it sees all. They are copies, unless the pages of the only sequence follow each other.
        """
        (pages, length), *others = zip(self._pages, self.lengths, strict=True)
        if not others and pages == list(range(pages[0], pages[0] + len(pages))):
            first, begin = pages[0] * PAGE, 0 if window is None else max(0, length - window)
            return [x.flatten(1, 2)[:, None, first + begin : first + length] for x in kept], None
        table, hidden = self._table(len(kept[0]), window)
        rows = [x.flatten(0, 1).index_select(0, table) for x in kept]
        return [x.view(len(kept[0]), *hidden.shape, -1) for x in rows], hidden

    def _table(self, heads: int, window: int | None) -> tuple[Tensor, Tensor]:
        """The pages that each sequence's last token sees, among those of all heads, int64 [heads * sequences * pages],
        and which of their tokens it does not, bool [sequences, pages * tokens of one]; made once for all blocks with
        this window."""
        if window not in self._tables:
            first = [0 if window is None else max(0, length - window) for length in self.lengths]
            seen = [pages[begin // PAGE :] for pages, begin in zip(self._pages, first, strict=True)]
            longest = max(map(len, seen))
            table = torch.tensor([[*pages, *[0] * (longest - len(pages))] for pages in seen]).flatten()
            table = (torch.arange(heads)[:, None] * self.capacity + table).flatten()
            skipped = torch.tensor(
                [[begin // PAGE * PAGE, begin, end] for begin, end in zip(first, self.lengths, strict=True)]
            )
            places = torch.arange(longest * PAGE) + skipped[:, :1]
            hidden = (places < skipped[:, 1:2]) | (places >= skipped[:, 2:])
            self._tables[window] = table.to(self.slots.device), hidden.to(self.slots.device)
        return self._tables[window]


class BlockCache:
    """Keys and values of one block, [kv heads, pages, tokens of one, head_dim] each.

    Args:
        ends: nothing comes behind this block but the head, which reads the last token of each sequence alone.
    """

    def __init__(self, *, ends: bool = False) -> None:
        self._ends = ends
        self._kept: list[Tensor] = []
        self.now: Pass | None = None

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(x.nbytes for x in self._kept)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attending, sinks: Tensor | None) -> Tensor:
        """Keep keys and values of the tokens of a pass, [tokens, 1, kv heads, head_dim], and attend with each of its
        sequences to what is kept of it.

        Args:
            q: [tokens, 1, heads, head_dim].
            sinks: see `tplaunch.model.attend.attend`.

        Returns:
            [tokens, 1, heads * d of v], of those that are `needed`.
        """
        now = self.now
        assert now is not None
        self._kept = [_grown(x, new, now.capacity) for x, new in zip(self._kept or (None, None), (k, v), strict=True)]
        for x, new in zip(self._kept, (k, v), strict=True):
            x.flatten(1, 2).index_copy_(1, now.slots, new[:, 0].transpose(0, 1))
        if now.one_each or self._ends:
            (keys, values), hidden = now.read(self._kept, how.window)
            return attend_rows(self.needed(q)[:, 0], keys, values, hidden, how, sinks).unsqueeze(1)
        parts = zip(*(x.split(now.counts) for x in (q, k, v)), strict=True)  # all tokens of their sequences
        made = [attend(queries, keys, values, how, sinks=sinks) for queries, keys, values in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def needed(self, x: Tensor) -> Tensor:
        """The tokens of a pass, [tokens, ...], that are read behind this block's attention."""
        now = self.now
        assert now is not None
        return x[now.last] if self._ends and not now.one_each else x


def _grown(kept: Tensor | None, new: Tensor, capacity: int) -> Tensor:
    """A block's tensor with room for as many pages; zeros, since what no query sees is multiplied with nought."""
    if kept is not None and kept.shape[1] >= capacity:
        return kept
    grown = new.new_zeros(new.shape[2], capacity, PAGE, new.shape[3])
    if kept is not None:
        grown[:, : kept.shape[1]] = kept
    return grown


class StageCache:
    """The caches of a stage's blocks, and the rotary tables of the places that were asked for.

    Args:
        blocks: how many.
        ropes: makes the tables of some places, int64 [s].
        last: the head comes behind them.
    """

    def __init__(
        self, blocks: int, ropes: Callable[[Tensor], tuple[Tensor | None, ...]], *, last: bool = False
    ) -> None:
        self.blocks = [BlockCache(ends=last and number == blocks - 1) for number in range(blocks)]
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
