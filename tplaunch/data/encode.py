"""Blocks of text to tokens, in order, on all cores."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.answers import ChatReader
from tplaunch.data.conversations import conversations
from tplaunch.data.text import Block
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError

# Characters that are tokenized in one call: the library takes more than a hundred bytes for one of text.
_TOGETHER = 1 << 16
_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Encoded:
    """The tokens of a block.

    Attributes:
        tokens: of all its documents, end-of-document tokens included, shape [n].
        ends: positions in `tokens` after which a document ends, ascending.
        read: bytes of input that the block took.
        bad: what is wrong with documents that were left out.
        loss: of conversations, which tokens are targets, shape [n].
        counts: of conversations: `corpus.ChatMeta`'s.
    """

    tokens: NDArray[np.integer]
    ends: list[int]
    read: int
    bad: list[Problem]
    loss: NDArray[np.bool_] | None = None
    counts: Counter[str] = field(default_factory=Counter)


def encode(block: Block, tokenizer: Tokenizer, text_key: str, skip_bad: bool = False) -> Encoded:
    """Tokenize one block. Documents without text are left out, and bad ones with `skip_bad`."""
    bad = list(block.bad)
    texts = [text for text in block.texts(text_key, bad if skip_bad else None) if text]
    parts = [part for group in _groups(texts) for part in _together(group, block.before, tokenizer)]
    if block.ends:
        eod = np.array([tokenizer.eod], tokenizer.dtype)
        ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64).tolist()
        parts = [piece for part in parts for piece in (part, eod)]
    else:
        ends = []
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    return Encoded(tokens, ends, block.read, bad)


def encode_chat(block: Block, chat: ChatReader, skip_bad: bool = False) -> Encoded:
    """Tokenize one block of conversations. Those with nothing to learn are left out, and bad ones with `skip_bad`."""
    bad = list(block.bad)
    counts: Counter[str] = Counter()
    tokens, loss = [np.empty(0, chat.tokenizer.dtype)], [np.empty(0, np.bool_)]
    for conversation in conversations(block, bad if skip_bad else None):
        try:
            learned = chat.read(conversation)
        except TplaunchError as error:
            if not skip_bad:
                raise
            bad.extend(error.problems)
            continue
        if not learned.loss.any():
            counts["unanswered"] += 1
            continue
        tokens.append(learned.tokens)
        loss.append(learned.loss)
        counts.update(answers=learned.answers, unended=learned.unended, merged=learned.merged)
        counts["targets"] += int(learned.loss.sum())
    ends = np.cumsum([len(part) for part in tokens[1:]], dtype=np.int64).tolist()
    return Encoded(np.concatenate(tokens), ends, block.read, bad, np.concatenate(loss), counts)


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Texts that are tokenized together: some short ones, or one."""
    start = size = 0
    for number, text in enumerate(texts):
        if size + len(text) > _TOGETHER and number > start:
            yield texts[start:number]
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def _together(texts: list[str], before: str, tokenizer: Tokenizer) -> list[NDArray[np.integer]]:
    """The tokens of each text of a group; of a long one by the piece."""
    if len(text := texts[0]) <= 2 * _TOGETHER:
        return tokenizer.encode_batch(texts, before)
    parts = (text[start : start + _TOGETHER] for start in range(0, len(text), _TOGETHER))
    pieces = tokenizer.cuts.pieces(parts, _TOGETHER, before)
    return [np.concatenate([tokenizer.encode_batch([piece], begin)[0] for begin, piece, _ in pieces])]


def encode_all(
    blocks: Iterable[Block],
    tokenizer: Tokenizer,
    text_key: str,
    skip_bad: bool = False,
    chat: ChatReader | None = None,
) -> Iterator[Encoded]:
    """Tokenize blocks in order, by a thread a core, holding a few blocks of each.

    Threads, as the library works outside of Python's lock: a process a core would hold a tokenizer a core, of
    hundreds of megabytes with a large vocabulary.

    Args:
        blocks: what to tokenize.
        tokenizer: one for all threads.
        text_key: field or column that holds the text.
        skip_bad: leave out what cannot be read.
        chat: the blocks hold conversations, which this makes tokens of.

    Raises:
        TplaunchError: a block cannot be read.
    """
    threads = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads)
    before = os.environ.get(_LIBRARY_THREADS)
    os.environ[_LIBRARY_THREADS] = "false"  # handing texts to threads of its own costs a tenth
    try:
        source = iter(blocks)
        waiting: deque[Future[Encoded]] = deque()
        while True:
            for block in islice(source, 2 * threads - len(waiting)):
                if chat is None:
                    waiting.append(pool.submit(encode, block, tokenizer, text_key, skip_bad))
                else:
                    waiting.append(pool.submit(encode_chat, block, chat, skip_bad))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            os.environ.pop(_LIBRARY_THREADS, None)
        else:
            os.environ[_LIBRARY_THREADS] = before
