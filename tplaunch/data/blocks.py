"""Files of tokens by block: checksums that tell where a file is damaged, of some blocks or all, on all cores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tplaunch.machine import count_cores

BLOCK = 16 * 2**20  # bytes; a multiple of every token's size
SAMPLED = 8  # blocks that a start reads of a file, where it has no thousands of them


def block_count(path: Path, block: int) -> int:
    return -(-path.stat().st_size // block)


def sample_of(count: int, most: int = SAMPLED) -> list[int]:
    """Numbers of up to `most` of `count` blocks, spread evenly, the first and the last among them; all where there are
    no more."""
    if count <= most:
        return list(range(count))
    return [number * (count - 1) // max(1, most - 1) for number in range(most)]


@dataclass(frozen=True)
class Look:
    """What a block holds.

    Attributes:
        number: of the block.
        sha256: in hex.
        smallest, largest: tokens; 0 and -1 where there are none, or no tokens were asked for.
    """

    number: int
    sha256: str
    smallest: int = 0
    largest: int = -1


def look(
    path: Path,
    numbers: Sequence[int],
    dtype: np.dtype | None = None,
    *,
    block: int,
    advance: Callable[[int], object] = lambda blocks: None,
) -> Iterator[Look]:
    """Read blocks, in order, by a thread a core: hashing and reading both leave the interpreter free.

    Args:
        path: of the file.
        numbers: of the blocks.
        dtype: of its tokens, where those are to be looked at.
        block: bytes of one.
        advance: called with 1 after each.
    """

    def one(number: int) -> Look:
        with path.open("rb") as file:
            content = os.pread(file.fileno(), block, number * block)
        sha256 = hashlib.sha256(content).hexdigest()
        if dtype is None or not content:
            return Look(number, sha256)
        tokens = np.frombuffer(content, dtype)
        return Look(number, sha256, int(tokens.min()), int(tokens.max()))

    with ThreadPoolExecutor(count_cores()) as pool:
        for found in pool.map(one, numbers):
            advance(1)
            yield found


def block_sums(path: Path, block: int = BLOCK) -> list[str]:
    """SHA-256 of each block of a file, in hex."""
    return [found.sha256 for found in look(path, range(block_count(path, block)), block=block)]


def whole_places(damaged: Iterable[int], block: int, size: int) -> list[tuple[int, int]]:
    """The ranges of bytes [begin, end) that damaged blocks take, neighbours joined."""
    places: list[tuple[int, int]] = []
    for number in damaged:
        begin, end = number * block, min((number + 1) * block, size)
        if places and places[-1][1] == begin:
            begin = places.pop()[0]
        places.append((begin, end))
    return places
