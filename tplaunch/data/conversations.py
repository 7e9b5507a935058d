"""Conversations of a .jsonl file: `messages`, or a `prompt` and its `completion`, both text or both messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tplaunch.data.endings import FORMAT
from tplaunch.data.inputs import shown
from tplaunch.data.text import BLOCK, Block, refuse_array
from tplaunch.data.unpack import DAMAGED, unpacked
from tplaunch.errors import Problem, TplaunchError

LONGEST = 16 << 20  # bytes of a line: tokens of it take a hundred times as much memory, and no model sees so many
_FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    'or {"prompt": ..., "completion": ...}, both text or both messages'
)


@dataclass(frozen=True)
class Conversation:
    """A line of the file.

    Attributes:
        where: file and line.
        messages: {"role": ..., "content": ...} and whatever else the template reads; none where it is text.
        given: messages that the model is given, of those; the rest is its completion. None: that is not said.
        text: prompt and completion.
        more: what else the template is to be given, such as `tools`.
    """

    where: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    given: int | None = None
    text: tuple[str, str] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def chat_blocks(path: Path) -> Iterator[Block]:
    """Lines of a file, some at a time.

    Raises:
        TplaunchError: it is no .jsonl file, it is damaged, or a line is too long.
    """
    match = FORMAT.search(path.name)
    if match is None or match["lines"] not in ("json", "jsonl"):
        fix = f"write one a line of a .jsonl file: {_FORMS}"
        raise TplaunchError(Problem(f"{shown(path)}: conversations are read from JSON lines", fix=fix))
    with path.open("rb") as raw:
        name, number, before = shown(path), 1, 0
        stream = unpacked(raw, match["packed"] or "", path)
        try:
            while block := stream.read(BLOCK):
                if number == 1:
                    refuse_array(name, block)
                block += stream.readline(LONGEST)
                if len(block) - block.rfind(b"\n", 0, -1) > LONGEST:
                    line = number + block.count(b"\n", 0, -1)
                    what = f"the line has more than {LONGEST >> 20} MiB"
                    why = "it would be one conversation"
                    raise TplaunchError(Problem(what, why, where=f"{name}:{line}", fix="split it"))
                yield Block(name, "lines", block, number, read=raw.tell() - before)
                number, before = number + block.count(b"\n"), raw.tell()
        except DAMAGED as error:
            raise TplaunchError(
                Problem(f"cannot read it to its end: {error}", where=f"{name}: byte {raw.tell()}")
            ) from None


def conversations(block: Block, bad: list[Problem] | None = None) -> Iterator[Conversation]:
    """The conversations of a block; empty lines are none.

    Args:
        bad: takes what is wrong with lines, which are then left out.

    Raises:
        TplaunchError: a line is none; its place is named.
    """
    assert isinstance(block.payload, bytes)
    for number, line in enumerate(block.payload.split(b"\n"), block.first):
        try:
            if line.strip():
                yield _parse(line, f"{block.path}:{number}")
        except TplaunchError as error:
            if bad is None:
                raise
            bad.extend(error.problems)


def _parse(line: bytes, where: str) -> Conversation:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TplaunchError(Problem("not JSON", why=str(error), where=where)) from None
    if not isinstance(record, dict):
        raise TplaunchError(Problem(f"no conversation, but a {type(record).__name__}", where=where, fix=_FORMS))
    made = Conversation(where, more=_more(record, where))
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return replace(made, text=(prompt, completion))
    if prompt is not None and completion is not None:
        given, rest = _messages(prompt, "prompt", where), _messages(completion, "completion", where)
        return replace(made, messages=[*given, *rest], given=len(given))
    if "messages" not in record:
        fields = f"its fields: {', '.join(record)}" if record else "it is empty"
        raise TplaunchError(Problem("no messages, and no prompt with a completion", fields, fix=_FORMS, where=where))
    return replace(made, messages=_messages(record["messages"], "messages", where))


def _messages(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    sound = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not sound or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in value):
        raise TplaunchError(Problem(f"{name} must be a list of {{role, content}}", where=where, fix=_FORMS))
    return list(value)


def _more(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What a line says for the template alone: `tools`, as a list or as the text of one, and further values."""
    tools, more = record.get("tools"), record.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise TplaunchError(Problem("tools is not JSON", why=str(error), where=where)) from None
    if not isinstance(more, dict):
        raise TplaunchError(Problem("chat_template_kwargs must be a mapping", where=where))
    return {"tools": tools or None, **more}
