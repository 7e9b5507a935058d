"""The mark of the token that ends documents, in a `tokenizer.json` whose names do not tell it: put in and taken out
without a change of any other character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MARK = "ends_documents"  # a key of an added token: it ends documents, whatever the names say
_WRITTEN = f'"{MARK}":true,'
_ADDED = re.compile(r'"added_tokens"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")


def mark(text: str, end: str) -> str:
    """Mark an added token, and no other one.

    Args:
        text: of a tokenizer.json.
        end: the token's content.
    """
    text = unmark(text)
    content = json.loads(text)
    for token in content["added_tokens"]:
        if token["content"] == end:
            token[MARK] = True
    for start, token in _tokens(text):
        made = f"{text[: start + 1]}{_WRITTEN}{text[start + 1 :]}"
        if token.get("content") == end and json.loads(made) == content:
            return made
    return json.dumps(content, ensure_ascii=False)


def unmark(text: str) -> str:
    """Take the mark out: the text as it was before, where `mark` put it in; else, as of earlier versions, its
    meaning."""
    content = json.loads(text)
    found = [token for token in content.get("added_tokens") or [] if MARK in token]
    if not found:
        return text
    for token in found:
        del token[MARK]
    for start, token in _tokens(text):
        made = text[: start + 1] + text[start + 1 :].removeprefix(_WRITTEN)
        if MARK in token and json.loads(made) == content:
            return made
    return json.dumps(content, ensure_ascii=False)


def _tokens(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where objects of lists called `added_tokens` begin, and what they are."""
    decoder = json.JSONDecoder()
    for match in _ADDED.finditer(text):
        at = match.end()
        while True:
            between = _BETWEEN.match(text, at)
            at = between.end() if between else at
            try:
                token, end = decoder.raw_decode(text, at)
            except ValueError:
                break
            if not isinstance(token, dict):
                break
            yield at, token
            at = end
