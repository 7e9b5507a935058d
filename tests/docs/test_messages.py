"""The messages that the guide to troubleshooting explains are those of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import tplaunch
from tests.docs.pages import DOCS, prose

PACKAGE = Path(tplaunch.__file__).parent
_SHORT = 8  # signs of its own that a text of the code needs to be recognized
_SHARE = 0.3  # of a message that must be the code's own words, not values


@cache
def texts() -> list[tuple[str, ...]]:
    """Every text of the code as its own words, between which values stand."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (notes | inside):
                found.append((node.value,))
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                words = "".join("\0" if part is None else part for part in parts)
                found.append(tuple(words.split("\0")))
    return [words for words in found if sum(map(len, words)) >= _SHORT]


def is_said(message: str) -> bool:
    """Does the code have a text that becomes this message, with some values in it?"""
    near = [
        words
        for words in texts()
        if sum(map(len, words)) >= _SHARE * len(message) and all(part in message for part in words)
    ]
    return any(re.fullmatch(".*?".join(map(re.escape, words)), message, re.S) for words in near)


def quoted() -> list[str]:
    return re.findall(r"^### `(.+)`$", prose(DOCS / "guides/troubleshooting.md"), re.M)


def test_the_code_says_each_message() -> None:
    messages = quoted()
    assert len(messages) > 20
    assert [message for message in messages if not is_said(message)] == []


def test_a_message_that_the_code_does_not_have_is_found() -> None:
    assert is_said("another launch is using runs/quickstart")
    assert not is_said("another launch uses runs/quickstart")
    assert not is_said("no such key as this")
    assert not is_said("runs/quickstart")
