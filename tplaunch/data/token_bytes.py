"""How many bytes of text each token of a vocabulary stands for.

Summed over tokens that follow each other they are the bytes of the text that these decode to, without decoding it, and
also where a piece of text begins or ends inside of a character.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from tplaunch.data.tokenizer import Tokenizer

_SPACE = "\u2581"  # SentencePiece's


class TokenBytes(NamedTuple):
    """The bytes of tokens.

    Args:
        sizes: int64 [rows], UTF-8 bytes of each token inside of a text; 0 of special tokens, and of none.
        at_start: int64 [rows], the same at a document's start, where some tokenizers' texts have a space less.
        before: the token after which a document's text begins.
    """

    sizes: NDArray[np.int64]
    at_start: NDArray[np.int64]
    before: int


def token_bytes(tokenizer: Tokenizer, rows: int) -> TokenBytes | None:
    """The bytes of each token; None where the tokenizer joins tokens in a way that is not known (neither byte-level
    nor SentencePiece's).

    Args:
        rows: of the model's vocabulary, at least the tokenizer's.
    """
    content = json.loads(tokenizer.json)
    joins = _steps(content.get("decoder"))
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    kinds = [step["type"] for step in joins]
    byte_level = kinds == ["ByteLevel"]
    # What SentencePiece's do: a space for each mark, bytes for tokens such as <0x0A>, and one space less at the start.
    spaces = set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and bool(kinds)
    replaces = [step for step in joins if step["type"] == "Replace"]
    if any((step["pattern"].get("String"), step["content"]) != (_SPACE, " ") for step in replaces):
        spaces = False
    if not (byte_level or spaces):
        return None
    stripped = any(_strips(step) for step in joins)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    sizes, at_start = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for text, number in tokenizer.vocabulary().items():
        if number in added:
            size = 0 if added[number].get("special") else len(added[number]["content"].encode())
            sizes[number] = at_start[number] = size
            continue
        if byte_level:
            size = len(text) if alphabet.issuperset(text) else len(text.encode())
        elif "ByteFallback" in kinds and _is_byte(text):
            size = 1
        else:
            size = len(text.replace(_SPACE, " ").encode())
        sizes[number] = size
        at_start[number] = size - (stripped and text.startswith((_SPACE, " ")))
    before = tokenizer.begin[-1] if tokenizer.begin else tokenizer.eod
    return TokenBytes(sizes, at_start, before)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for one in decoder["decoders"] for step in _steps(one)]
    return [decoder]


def _strips(step: dict[str, Any]) -> bool:
    """Whether a step of decoding takes a space from the text's start."""
    if step["type"] == "Strip":
        return bool(step["content"] == " " and step["start"] > 0)
    never = step.get("prepend_scheme", "always") == "never" or step.get("add_prefix_space") is False
    return bool(step["type"] == "Metaspace" and not never)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
