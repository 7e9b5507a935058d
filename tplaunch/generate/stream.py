"""Text as its tokens come, decoded a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tplaunch.data.tokenizer import Tokenizer

_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what decodes to it may lack bytes that later tokens bring


class TextStream:
    """The text of a prompt and what follows it.

    A token's text depends on those before it (spaces between words, the bytes of one character), but only on the
    nearest: so each is decoded with those since the last place where the text was whole, never with all before.

    Args:
        tokenizer: decodes.
        prompt: tokens that come first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.shown = tokenizer.decode(list(prompt))
        self._context = list(prompt)[-_CONTEXT:]
        self._context_text = tokenizer.decode(self._context)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that a token adds; a character that is not whole yet waits for its other bytes."""
        self._pending.append(token)
        text = self.tokenizer.decode([*self._context, *self._pending])
        if text.endswith(_PARTIAL):
            return ""
        new = text[len(self._context_text) :]
        self._context = [*self._context, *self._pending][-_CONTEXT:]
        self._context_text = self.tokenizer.decode(self._context)
        self._pending = []
        return new

    def rest(self) -> str:
        """What is left when no more tokens come, whole or not."""
        return self.tokenizer.decode([*self._context, *self._pending])[len(self._context_text) :]


_CONTEXT = 8  # tokens before a new one that it is decoded with


class StopText:
    """A text up to the first of some strings; what may become one of them is held back.

    Args:
        stops: the strings, none empty.

    Attributes:
        stopped: whether one came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def add(self, piece: str) -> str:
        """What is certain to be before a stop."""
        if self.stopped or not self.stops:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What is left when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
