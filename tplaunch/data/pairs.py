"""A text and what is to follow it, as rows: lm-eval's conventions (EleutherAI lm-evaluation-harness 0.4,
`lm_eval.api.model.TemplateLM` and `lm_eval.models.huggingface.HFLM`). Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tplaunch.data.beside import TOKENIZER_CONFIG, read_beside, token_text
from tplaunch.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """A row (`evaluate.rows.Given`).

    Args:
        tokens: of the context, less what there is no room for, and of what follows it.
        first: the first token of what follows.
        cut: tokens of the context that were left out, from its beginning.
    """

    tokens: list[int]
    first: int
    cut: int = 0


class Words:
    """Text to rows.

    Args:
        tokenizer: the tokenizer.
        path: its file; what lies beside it may name begin-of-sequence.
        limit: tokens that the model sees at once.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        name = token_text(read_beside(path, TOKENIZER_CONFIG).get("bos_token"))
        known = None if name is None else tokenizer.token_id(name)
        # What stands before a text that nothing precedes.
        self.prefix = known if known is not None else tokenizer.begin[0] if tokenizer.begin else tokenizer.eod
        self._prefix_text = tokenizer.decode([self.prefix], skip_special_tokens=False)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            special: begin it as the tokenizer begins texts, unless it does so itself.
        """
        ids, begin = self.tokenizer.encode_prompt(text), list(self.tokenizer.begin)
        if begin and ids[: len(begin)] == begin and not (special and not text.startswith(self._prefix_text)):
            return ids[len(begin) :]
        return ids

    def pair(self, context: str, continuation: str) -> Pair:
        """The row of a continuation after a context; spaces at the end of the context belong to the continuation.

        Where the two have more tokens than the model sees at once, the context loses some at its beginning; of a
        continuation that has more itself, the last are scored.
        """
        if context == "":
            after = self.encode(continuation, special=False)
            before, after = ([self.prefix], after) if after[:1] != [self.prefix] else (after[:1], after[1:])
        else:
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            before = self.encode(stripped)
            after = self.encode(stripped + continuation)[len(before) :]
            before = before or [self.prefix]
        tokens = [*before, *after]
        cut = max(0, len(tokens) - (self.limit + 1))
        return Pair(tokens[cut:], max(1, len(before) - cut), cut)

    def rolling(self, text: str) -> Iterator[Pair]:
        """Rows in which each token of a text is scored once: the first after `prefix`, those of the last row with all
        the context that there is room for."""
        tokens = [self.prefix, *self.encode(text)]
        for begin in range(1, len(tokens), self.limit):
            end = min(begin + self.limit, len(tokens))
            start = max(0, end - self.limit - 1)
            yield Pair(tokens[start:end], begin - start)


def as_rows(pairs: Sequence[Pair]) -> list[tuple[list[int], int]]:
    """The rows of a request (`evaluate.worker.Request`)."""
    return [(pair.tokens, pair.first) for pair in pairs]
