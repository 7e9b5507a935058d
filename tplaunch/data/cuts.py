"""Where a text may be cut so that the tokens of its pieces are the tokens of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_REACH = 64  # characters to each side in which a pre-tokenizer must show what it does at a place
_TRIES = 64  # places of a kind that are looked at


class Cuts:
    """Finds places where a tokenizer joins nothing.

    A piece is encoded behind the one character that stands before it, whose tokens are then dropped: what a tokenizer
    puts before a text (SentencePiece's "▁") so never lands in the middle. A place is taken only where

    - the pre-tokenizer splits there, and splits left and right of it the same with and without the other side
      (byte-level kinds: GPT-2, Llama 3, Qwen, DeepSeek; T5's); or
    - there is no pre-tokenizer that splits, the model is BPE, and no token of the vocabulary holds the two characters
      beside each other, so that no merge can cross (SentencePiece's kinds: Llama 2, Mistral, Gemma).

    That holds for pre-tokenizers that read from left to right and whose state ends where the class of characters
    changes, as those of all published tokenizers do; the change must be in sight. A tokenizer without such places
    gets its text whole.

    Args:
        tokenizer: the library's.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        # Special tokens in a text are text here (`encode_special_tokens`); the others are found before all else.
        self._added = [token.content for token in added if not token.special]
        self._reach = max(_REACH, 2 * max(map(len, self._added), default=0))

    def pieces(self, parts: Iterable[str], size: int, before: str = "") -> Iterator[tuple[str, str, bool]]:
        """Cut a text that comes in parts; it is held for as long as there is no place to cut it.

        Args:
            parts: of the text, in order.
            size: characters from which it is cut.
            before: the character that stands before the text, where it is itself a piece.

        Yields:
            The character before a piece, the piece, whether it is the last one.
        """
        held, searched = "", 0
        for part in parts:
            held += part
            if len(held) < size:
                continue
            if place := self.last(held, searched):
                yield before, held[:place], False
                before, held, searched = held[place - 1], held[place:], 0
            else:
                searched = len(held)
        if held:
            yield before, held, True

    def last(self, text: str, start: int = 0) -> int:
        """The last place to cut a text that goes on, of those found at once; 0 where there is none.

        Args:
            text: what is there of it.
            start: up to where it was searched before.
        """
        end = len(text) - self._reach  # what follows a place must be seen
        start = max(1, start - self._reach)
        return next((place for place in _candidates(text, start, end) if self.at(text, place)), 0)

    def at(self, text: str, place: int) -> bool:
        """Whether the tokens of `text` are those of its two parts, cut before character `place`."""
        left, right = text[max(0, place - self._reach) : place], text[place : place + self._reach]
        near = left + right
        if place > self._reach and _run(left) == len(left):
            return False
        if self._added and any(token in form for form in (near, self._normal(near)) for token in self._added):
            return False
        whole, before, alone, after = map(self._split, (near, left, left[-1], left[-1] + right))
        if after[: len(alone)] == alone and whole == before + after[len(alone) :]:
            return True
        if not len(whole) == len(before) == len(alone) == len(after) == 1 or self._model is None:
            return False
        behind = after[0][len(alone[0]) :]
        fits = after[0].startswith(alone[0]) and whole[0] == before[0] + behind and before[0][-1:] == alone[0][-1:]
        return fits and bool(behind) and self._model.never_joins(before[0][-1:], behind[0])

    def _normal(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def _split(self, text: str) -> list[str]:
        text, pre_tokenizer = self._normal(text), self._tokenizer.pre_tokenizer
        return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]

    @cached_property
    def _model(self) -> _Pairs | None:
        model = self._tokenizer.model
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if not isinstance(model, models.BPE) or any(getattr(model, key) for key in odd):
            return None
        return _Pairs(self._tokenizer.get_vocab(with_added_tokens=False), model.byte_fallback)


class _Pairs:
    """Which characters stand beside each other inside a token of a BPE model."""

    def __init__(self, vocabulary: Iterable[str], byte_fallback: bool) -> None:
        self._known = {token for token in vocabulary if len(token) == 1}
        self._pairs = {pair for token in vocabulary for pair in itertools.pairwise(token)}
        # Characters beyond the vocabulary become bytes, each its own token; else runs of them may be one `unk`.
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
        merged = (token for token in vocabulary if "<0x" in token and token not in bytes_)
        self._bytes = byte_fallback and bytes_ <= set(vocabulary) and not any(merged)

    def never_joins(self, left: str, right: str) -> bool:
        """Whether no merge crosses these two characters."""
        return (self._bytes or left in self._known) and (left, right) not in self._pairs


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2's, that has learned nothing yet."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _candidates(text: str, start: int, end: int) -> Iterator[int]:
    """Places to try, the best kind first, from the end: after a line, before a word, where characters change."""
    for mark, shift in (("\n", 1), (" ", 0)):
        found = end
        for _ in range(_TRIES):
            found = text.rfind(mark, start, found)
            if found < 1:
                break
            place = found + shift
            if start <= place <= end and not text[found - 1].isspace() and not text[found + 1 : found + 2].isspace():
                yield place
    places = range(end, max(start, end - 16 * _TRIES) - 1, -1)
    yield from itertools.islice((n for n in places if _class(text[n - 1]) != _class(text[n])), _TRIES)


def _class(character: str) -> tuple[bool, bool, bool]:
    return character.isalpha(), character.isnumeric(), character.isspace()


def _run(text: str) -> int:
    """Characters of one class at the end of a text."""
    return sum(1 for _ in itertools.takewhile(lambda one: _class(one) == _class(text[-1]), reversed(text)))
