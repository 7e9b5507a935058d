"""Blocks of text to tokens, in order, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.text import Block
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError

_POOL_FROM = 4 << 20  # input bytes from which other processes are worth their start
_TOGETHER = 1 << 18  # characters of whole texts that are tokenized in one call


@dataclass(frozen=True)
class Encoded:
    """The tokens of a block.

    Attributes:
        tokens: of all its documents, end-of-document tokens included, shape [n].
        ends: positions in `tokens` after which a document ends, ascending.
        read: bytes of input that the block took.
        bad: what is wrong with documents that were left out.
    """

    tokens: NDArray[np.integer]
    ends: list[int]
    read: int
    bad: list[Problem]


def encode(block: Block, tokenizer: Tokenizer, text_key: str, skip_bad: bool = False) -> Encoded:
    """Tokenize one block. Documents without text are left out, and bad ones with `skip_bad`."""
    bad = list(block.bad)
    texts = [text for text in block.texts(text_key, bad if skip_bad else None) if text]
    parts = [part for group in _groups(texts) for part in tokenizer.encode_batch(group, block.before)]
    if block.ends:
        eod = np.array([tokenizer.eod], tokenizer.dtype)
        ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64).tolist()
        parts = [piece for part in parts for piece in (part, eod)]
    else:
        ends = []
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    return Encoded(tokens, ends, block.read, bad)


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Texts that are tokenized together: the library takes more than a hundred bytes for one of text."""
    start = size = 0
    for number, text in enumerate(texts):
        if size + len(text) > _TOGETHER and number > start:
            yield texts[start:number]
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def encode_all(
    blocks: Iterable[Block], tokenizer: Path, text_key: str, size: int, skip_bad: bool = False
) -> Iterator[Encoded]:
    """Tokenize blocks in order; by a process a core where there is much, holding a few blocks of each.

    Args:
        blocks: what to tokenize.
        tokenizer: a tokenizer.json.
        text_key: field or column that holds the text.
        size: bytes of input.
        skip_bad: leave out what cannot be read.

    Raises:
        TplaunchError: a block cannot be read, or a process was killed.
    """
    if size < _POOL_FROM:
        loaded = Tokenizer(tokenizer)
        yield from (encode(block, loaded, text_key, skip_bad) for block in blocks)
        return
    processes = len(os.sched_getaffinity(0))
    # Not forked: the parent may have threads (progress bar, tokenizers' own) that a fork would cut off.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process)
    try:
        source = iter(blocks)
        waiting: deque[Future[Encoded]] = deque()
        while True:
            for block in islice(source, 2 * processes - len(waiting)):
                waiting.append(pool.submit(_encode_in_process, block, tokenizer, text_key, skip_bad))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise TplaunchError(
            Problem(
                "a tokenizing process ended", why="perhaps killed by the kernel, for want of memory", fix="run again"
            )
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its pool, and its processes would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _load(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _encode_in_process(block: Block, tokenizer: Path, text_key: str, skip_bad: bool) -> Encoded:
    return encode(block, _load(tokenizer), text_key, skip_bad)
