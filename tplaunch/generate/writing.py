"""What follows each prompt, told as it comes and in the order of the prompts, however they end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.stream import StopText, TextStream


@dataclass
class Writing:
    """What follows one prompt.

    Args:
        stream: decodes it.
        text: cuts it at a stop string.
    """

    stream: TextStream
    text: StopText
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: str | None = None

    def add(self, token: int) -> bool:
        """Take a token; whether a stop string is there."""
        self.tokens.append(token)
        self.pieces.append(self.text.add(self.stream.add(token)))
        return self.text.stopped

    def end(self, finish: str) -> None:
        """No more tokens come, because of `finish`."""
        self.pieces += [self.text.add(self.stream.rest()), self.text.rest()]
        self.finish = finish


class Writings:
    """What follows all prompts.

    Args:
        tokenizer: decodes.
        prompts: token ids of each.
        stops: strings that end a text and are no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], stops: Sequence[str]) -> None:
        self.all = [Writing(TextStream(tokenizer, prompt), StopText(stops)) for prompt in prompts]

    def stop(self, prompt: int, token: int) -> bool:
        """Take a token; whether it is the last by a stop string."""
        return self.all[prompt].add(token)

    def end(self, prompt: int, finish: str) -> None:
        """No more tokens of a prompt come."""
        self.all[prompt].end(finish)


class ShowText:
    """Prints prompts and what follows: of the first that has not ended as it comes, the others behind it."""

    def __init__(self, writings: Writings, out: TextIO) -> None:
        self.writings, self.out = writings.all, out
        self._at = self._shown = 0
        self._begun = False

    def tell(self) -> None:
        """Print what is new."""
        while self._at < len(self.writings):
            one = self.writings[self._at]
            if not self._begun:
                print(one.stream.shown, end="", file=self.out)
                self._begun = True
            print("".join(one.pieces[self._shown :]), end="", file=self.out, flush=True)
            self._shown = len(one.pieces)
            if one.finish is None:
                return
            print(file=self.out, flush=True)
            self._at, self._shown, self._begun = self._at + 1, 0, False


class ShowJson:
    """Prints a line of JSON for each prompt that has ended.

    Args:
        about: what is said of each prompt before what follows it.
        log_probabilities: whether they are told.
    """

    def __init__(
        self, writings: Writings, about: Sequence[dict[str, Any]], out: TextIO, *, log_probabilities: bool
    ) -> None:
        self.writings, self.about, self.out = writings.all, about, out
        self.log_probabilities = log_probabilities
        self._at = 0

    def tell(self) -> None:
        """Print what is new."""
        while self._at < len(self.writings) and (one := self.writings[self._at]).finish is not None:
            found = {"text": "".join(one.pieces), "tokens": one.tokens, "finish": one.finish}
            if self.log_probabilities:
                found["logprobs"] = one.log_probabilities
            print(json.dumps({**self.about[self._at], **found}, ensure_ascii=False), file=self.out, flush=True)
            self._at += 1
