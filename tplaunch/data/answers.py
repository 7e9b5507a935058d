"""Conversations as tokens, and which of these a model is to learn: what the assistant says, up to the token that ends
its turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.beside import GENERATION, read_beside
from tplaunch.data.chat import ChatTemplate, find_template, read_file
from tplaunch.data.conversations import Conversation
from tplaunch.data.longline import whole_characters
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError

_FORMAT = 1  # raise it when the same conversations would give other tokens or targets
LossOn = Literal["assistant", "all"]
_MARK = "name a template that marks answers by {% generation %} (finetune.chat_template, --chat-template)"
_ALL = "learn all tokens (finetune.loss_on: all, --loss-on all)"


class _Text(NamedTuple):
    """A text in tokens.

    Args:
        ids: of them.
        begins, ends: the characters of each, [n].
    """

    ids: list[int]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


def stops_of(file: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens after which a model that is used stops: those that the tokenizer's folder says, else the one that ends
    documents."""
    found = read_beside(file, GENERATION).get("eos_token_id")
    stops = [end for end in (found if isinstance(found, list) else [found]) if type(end) is int]
    return tuple(stops) or (tokenizer.eod,)


@dataclass(frozen=True)
class Learned:
    """A conversation in tokens.

    Attributes:
        tokens: ids, [n].
        loss: which of them are targets, bool [n]; never the first, which follows nothing.
        answers: of the assistant.
        unended: answers that do not end with a token that stops generation.
        merged: 1 where a token holds the end of a prompt and the beginning of its completion.
    """

    tokens: NDArray[np.integer]
    loss: NDArray[np.bool_]
    answers: int = 0
    unended: int = 0
    merged: int = 0


def chat_reader(file: Path, tokenizer: Tokenizer, template: Path | None, loss_on: LossOn) -> ChatReader:
    """What makes tokens of conversations.

    Args:
        file: the `tokenizer.json`.
        template: a file that renders them; None: what lies beside the tokenizer does.

    Raises:
        TplaunchError: the template cannot be read, or is none.
    """
    text = find_template(file) if template is None else read_file(template)
    made = ChatTemplate(text, file, template) if text is not None else None
    return ChatReader(tokenizer, made, loss_on, stops_of(file, tokenizer))


@dataclass(frozen=True)
class ChatReader:
    """Makes tokens of conversations.

    Attributes:
        tokenizer: within `names_read`.
        template: None: there is none, and all conversations are text.
        loss_on: all of a conversation, or what the assistant says.
        stops: tokens that end the assistant's turn (`stops_of`).
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    loss_on: LossOn
    stops: tuple[int, ...]

    def about(self) -> list[Any]:
        """All that tokens and targets follow from, but for the tokenizer, as JSON values."""
        template = [self.template.text, self.template.tokens] if self.template else None
        return [_FORMAT, template, self.loss_on, list(self.stops)]

    def read(self, one: Conversation) -> Learned:
        """A conversation in tokens.

        With `{% generation %}` in the template, what that marks is learned. Without it, an answer begins where the
        messages before it, rendered so that an answer follows, end, and ends where the messages with it do. A
        completion is learned whole. So TRL has it, but for the token that ends a turn: it is learned also where the
        template writes it behind what is marked, or as the beginning of what follows.

        Raises:
            TplaunchError: the template refuses it, or does not tell what the assistant says; its place is named.
        """
        try:
            learned = self._of_text(one) if one.text else self._of_messages(one)
        except TplaunchError as error:
            raise TplaunchError(*(replace(problem, where=one.where) for problem in error.problems)) from None
        learned.loss[:1] = False
        return learned

    def _of_text(self, one: Conversation) -> Learned:
        assert one.text is not None
        prompt, completion = one.text
        end = self.tokenizer.decode([self.tokenizer.eod], skip_special_tokens=False)
        text = prompt + completion + ("" if completion.endswith(end) else end)
        begins = self.tokenizer.begin and prompt.startswith(self.tokenizer.decode(self.tokenizer.begin, False))
        full, before = self._encode([text, prompt], whole=bool(begins))
        tokens, loss = np.array(full.ids, self.tokenizer.dtype), np.ones(len(full.ids), np.bool_)
        if self.loss_on == "all":
            return Learned(tokens, loss)
        start = _common(full.ids, before.ids)
        loss[:start] = False
        left = [place for place in range(start, len(before.ids)) if before.begins[place] < before.ends[place]]
        return Learned(tokens, loss, answers=1, merged=int(bool(left)))

    def _of_messages(self, one: Conversation) -> Learned:
        if self.template is None:
            raise TplaunchError(
                Problem(
                    "the tokenizer has no chat template to render messages by",
                    fix="put the model's chat_template.jinja beside its tokenizer.json, or " + _MARK,
                )
            )
        rendered = self.template.marked(one.messages, **one.more)
        if self.loss_on == "all":
            (full,) = self._encode([rendered.text], whole=True)
            return Learned(np.array(full.ids, self.tokenizer.dtype), np.ones(len(full.ids), np.bool_))
        first = one.given or 0
        answers = [n for n, message in enumerate(one.messages) if n >= first and message["role"] == "assistant"]
        completed = one.given is not None and answers == [first] == [len(one.messages) - 1]
        if self.template.marks and not completed:
            (full,) = self._encode([rendered.text], whole=True)
            places = [self._tokens_in(full, *span) for span in rendered.spans if span[0] < span[1]]
            if first:
                begin = len(self._before(one, first, rendered.text))
                places = [p for p, span in zip(places, rendered.spans, strict=True) if span[0] >= begin]
            places = [self._with_end(full, *place) for place in places]
        else:
            full, places = self._by_prefixes(one, answers, rendered.text, whole_rest=completed)
        loss = np.zeros(len(full.ids), np.bool_)
        for start, end in places:
            loss[start:end] = True
        unended = sum(not self._is_ended(full, *place) for place in places)
        return Learned(np.array(full.ids, self.tokenizer.dtype), loss, len(places), unended)

    def _by_prefixes(
        self, one: Conversation, answers: list[int], text: str, whole_rest: bool
    ) -> tuple[_Text, list[tuple[int, int]]]:
        """All tokens, and where answers are, found by rendering what comes before each, and what comes up to its end.

        Args:
            whole_rest: the one answer has all that is left.
        """
        before = [self._before(one, number, text) for number in answers]
        (full,) = self._encode([text], whole=True)
        prefixes = self.tokenizer.encode_given(before, whole=True, places=False)
        places = []
        for number, prefix in zip(answers, prefixes, strict=True):
            start = len(prefix)
            if full.ids[:start] != prefix.ids:
                raise _ambiguous(
                    f"message {number + 1}: the prompt before it ends within a token",
                    "the model would be asked by other tokens than it learned to answer",
                )
            if whole_rest:
                places.append((start, len(full.ids)))
                continue
            end = len(self._rendered(one, number + 1, text))
            stop = start + int(np.searchsorted(full.begins[start:], end))
            if stop > start and full.ends[stop - 1] > end:
                raise _ambiguous(f"message {number + 1} ends within a token", "the next message begins in it")
            places.append(self._with_end(full, start, stop))
        return full, places

    def _before(self, one: Conversation, number: int, text: str) -> str:
        """The messages before one, rendered so that an answer follows."""
        assert self.template is not None
        prompt = self.template.render(one.messages[:number], answer_follows=True, **one.more)
        if not text.startswith(prompt):
            raise _ambiguous(
                f"message {number + 1}: the template renders what is before it otherwise with it than without it",
                "what the assistant says cannot be told from its prompt",
            )
        return prompt

    def _rendered(self, one: Conversation, count: int, text: str) -> str:
        """The first messages, which must begin the whole text."""
        assert self.template is not None
        found = self.template.render(one.messages[:count], **one.more)
        ends = (self.tokenizer.decode([stop], skip_special_tokens=False) for stop in (*self.stops, self.tokenizer.eod))
        if not text.startswith(found):  # some write a token at the end of all (Phi-3)
            found = next((shorter for end in ends if text.startswith(shorter := found.removesuffix(end))), found)
        if not text.startswith(found):
            raise _ambiguous(
                f"message {count}: the template renders it otherwise where others follow it",
                "it takes something, such as reasoning, out of earlier answers, or adds it to the last",
            )
        return found

    def _with_end(self, full: _Text, start: int, stop: int) -> tuple[int, int]:
        """An answer's tokens, with the one that ends the turn where it stands right behind."""
        return start, stop + (not self._is_ended(full, start, stop) and self._begins_with_stop(full, stop))

    def _is_ended(self, full: _Text, start: int, stop: int) -> bool:
        last = self._last_written(full, start, stop)
        return last >= start and full.ids[last] in self.stops

    def _begins_with_stop(self, full: _Text, place: int) -> bool:
        return place < len(full.ids) and full.ids[place] in self.stops

    def _last_written(self, full: _Text, start: int, stop: int) -> int:
        """The last token before `stop` that is not space alone; `start` - 1 where there is none."""
        for place in range(stop - 1, start - 1, -1):
            if self.tokenizer.decode([full.ids[place]], skip_special_tokens=False).strip():
                return place
        return start - 1

    def _tokens_in(self, full: _Text, begin: int, end: int) -> tuple[int, int]:
        """The tokens that hold some of the characters [begin, end)."""
        inside = np.flatnonzero((full.begins < end) & (full.ends > begin))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)

    def _encode(self, texts: list[str], *, whole: bool) -> list[_Text]:
        made = self.tokenizer.encode_given([whole_characters(text, "") for text in texts], whole=whole)
        places = [np.array(one.offsets, np.int64).reshape(-1, 2) for one in made]
        return [_Text(one.ids, at[:, 0], at[:, 1]) for one, at in zip(made, places, strict=True)]


def _common(ids: list[int], others: list[int]) -> int:
    """How many of the first ids are the same."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _ambiguous(what: str, why: str) -> TplaunchError:
    return TplaunchError(Problem(what, why=why, fix=f"{_MARK}, give one answer a line, or {_ALL}"))
