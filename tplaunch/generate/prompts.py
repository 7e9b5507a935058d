"""What a model is given, and where it stops: the same in `tplaunch generate` and in a run's samples. Torch-free."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError
from tplaunch.generate.settings import Settings

STDIN = "-"
_ROLES = "a list of {role, content}"


@dataclass(frozen=True)
class Asked:
    """A prompt as a user gives it.

    Args:
        where: for messages.
        text: to continue, or to answer in a chat; None where there are messages.
        messages: of a chat: {"role", "content"} each.
        seed: of the choice of what follows; None: that of all.
    """

    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    seed: int | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """What its line of JSON says of it."""
        return {"prompt": self.text} if self.messages is None else {"messages": self.messages}


def read_prompts(source: str) -> list[Asked]:
    """The prompts of a file or of stdin: one a line, or JSONL with `prompt` or `messages`, and `seed` if a line has its
    own. Empty lines are none.

    Args:
        source: a path, or `STDIN`. A file is JSONL by its name, stdin where its first line begins with a brace.

    Raises:
        TplaunchError: it cannot be read, a line is no prompt, or there is none.
    """
    name = "stdin" if source == STDIN else source
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error.reason}"
        raise TplaunchError(Problem(f"{name} cannot be read", why=why or "", key="--prompts")) from None
    as_json = text.lstrip().startswith("{") if source == STDIN else Path(source).suffix in (".jsonl", ".json")
    found, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        line, where = line.removesuffix("\r"), f"{name}:{number}"
        if not line.strip():
            continue
        try:
            found.append(_from_json(line, where) if as_json else Asked(where, line))
        except TplaunchError as error:
            problems += error.problems
    if problems:
        raise TplaunchError(*problems)
    if not found:
        raise TplaunchError(Problem(f"{name} has no prompt", fix="write one a line", key="--prompts"))
    return found


def _from_json(line: str, where: str) -> Asked:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TplaunchError(Problem(f"{where} is not JSON", why=str(error))) from None
    value = value if isinstance(value, dict) else {}
    text, messages, seed = value.get("prompt"), value.get("messages"), value.get("seed")
    if messages is None and not isinstance(text, str):
        raise TplaunchError(Problem(f"{where} has no prompt", fix='{"prompt": "a text"} or {"messages": [...]} a line'))
    if messages is not None and not _are_messages(messages):
        raise TplaunchError(Problem(f"{where}: messages must be {_ROLES}", fix="mend it, or leave it out"))
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise TplaunchError(Problem(f"{where}: seed must be a whole number from 0", fix="mend it, or leave it out"))
    return Asked(where, None if messages is not None else text, messages, seed)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, as transformers makes them; one that would be empty begins a document."""
    return [tokenizer.encode_prompt(prompt) or [tokenizer.eod] for prompt in prompts]


def texts_of(asked: Sequence[Asked]) -> Iterator[str]:
    """The texts to continue.

    Raises:
        TplaunchError: one is a chat.
    """
    for one in asked:
        if one.text is None:
            raise TplaunchError(Problem(f"{one.where} has messages", fix="render them by the chat template: --chat"))
        yield one.text


def ends_of(tokenizer: Tokenizer, settings: Settings) -> tuple[int, ...]:
    """Tokens after which there are no more."""
    return settings.ends or (tokenizer.eod,)
