"""A chat as the text that its model was trained on: the tokenizer's own template, rendered as transformers does, in
jinja's sandbox, so that a template can reach nothing but what it is given. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tplaunch.data.beside import SPECIAL, TEMPLATE, TOKENIZER_CONFIG, read_beside, token_text
from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # fields that hold it
# What was rendered so far of the chat at hand, and where its marks are.
_TRACKED: ContextVar[tuple[list[str], list[tuple[int, int, str]]] | None] = ContextVar("tracked", default=None)


def read_file(path: Path) -> str:
    """A file that holds a template.

    Raises:
        TplaunchError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TplaunchError(Problem(f"{path} cannot be read", why=str(error))) from None


def find_template(tokenizer: Path) -> str | None:
    """The chat template beside a tokenizer: its own file, else the one in `tokenizer_config.json` (of several, the one
    named default); None where there is none.

    Raises:
        TplaunchError: it cannot be read.
    """
    path = tokenizer.with_name(TEMPLATE)
    if path.is_file():
        return read_file(path)
    found = read_beside(tokenizer, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def read_template(tokenizer: Path) -> str:
    """The chat template beside a tokenizer, for --chat.

    Raises:
        TplaunchError: there is none, or it cannot be read.
    """
    found = find_template(tokenizer)
    if found is None:
        what = f"{tokenizer.parent} has no chat template"
        fix = f"put the model's {TEMPLATE} there, or leave out --chat"
        raise TplaunchError(Problem(what, fix=fix, key="--chat"))
    return found


def render(template: str, tokenizer: Path, chats: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Chats as texts that the model's answer follows.

    Args:
        template: of `read_template`.
        tokenizer: whose special tokens it may name.

    Raises:
        TplaunchError: it is no template, or refuses a chat.
    """
    made = ChatTemplate(template, tokenizer)
    return [made.render(chat, answer_follows=True) for chat in chats]


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        spans: characters, [begin, end), that stand in `{% generation %}` blocks, in order.
    """

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A chat template, ready to be followed; threads may share it.

    Args:
        text: in jinja.
        tokenizer: whose special tokens it may name.
        file: that holds it, for messages; default: it is the tokenizer's own.

    Attributes:
        tokens: these, by name.
        marks: whether it says, by `{% generation %}`, what the assistant says.

    Raises:
        TplaunchError: it is no template.
    """

    def __init__(self, text: str, tokenizer: Path, file: Path | None = None) -> None:
        self.text, self._name = text, file or f"of {tokenizer.parent}"
        said = {**read_beside(tokenizer, SPECIAL), **read_beside(tokenizer, TOKENIZER_CONFIG)}
        found = {name: token_text(value) for name, value in said.items() if name.endswith("_token")}
        self.tokens = {name: token for name, token in found.items() if token is not None}
        self.marks = _GENERATION.search(text) is not None
        with self._followed():
            self._made = _environment().from_string(text)

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool = False, **more: Any) -> str:
        """A chat as text.

        Args:
            messages: role, content and whatever else the template reads.
            answer_follows: it ends where the assistant's answer begins.
            more: `tools`, or other values that the template reads.

        Raises:
            TplaunchError: the template refuses it.
        """
        return self.marked(messages, answer_follows=answer_follows, **more).text

    def marked(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool = False, **more: Any) -> Rendered:
        """As `render`, with what the template marks."""
        given = {"tools": None, "documents": None, "add_generation_prompt": answer_follows, **self.tokens, **more}
        parts: list[str] = []
        spans: list[tuple[int, int, str]] = []
        token = _TRACKED.set((parts, spans))
        try:
            with self._followed():
                for part in self._made.generate(messages=_as_given(messages), **given):
                    parts.append(part)
        finally:
            _TRACKED.reset(token)
        text = "".join(parts)
        if any(text[begin:end] != said for begin, end, said in spans):
            what = f"the chat template {self._name} puts what it marks elsewhere"
            why = "its {% generation %} stands in a macro, or in a value that is set"
            raise TplaunchError(Problem(what, why=why, fix="mark where the text is written"))
        return Rendered(text, [(begin, end) for begin, end, _ in spans])

    @contextmanager
    def _followed(self) -> Iterator[None]:
        from jinja2 import TemplateError

        try:
            yield
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"the chat template {self._name} cannot be followed"
            raise TplaunchError(Problem(what, why=str(error), fix="mend the messages, or the template")) from None


def _as_given(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to templates: without fields that are null, and with reasoning under each
    name that templates read."""
    found = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in _REASONING if name in kept), None)
        found.append(kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning})
    return found


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for, and may do: as `transformers.utils.chat_template_utils` has it."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %}, which marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - so jinja has it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        def _note(self, caller: Callable[[], str]) -> str:
            text = caller()
            if (tracked := _TRACKED.get()) is not None:
                parts, spans = tracked
                begin = sum(map(len, parts))
                spans.append((begin, begin + len(text), text))
            return text

    class Plain(Namespace):  # no way to what Python keeps behind names with underscores
        def __init__(*args: Any, **values: Any) -> None:
            self, rest = args[0], args[1:]
            for name in dict(*rest, **values):
                _check_name(name)
            Namespace.__init__(self, *rest, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no place for {name!r}")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:  # jinja's own escapes what HTML would read
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals.update(
        raise_exception=refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=lambda *values, **named: dict(*values, **named),
        namespace=Plain,
    )
    return made
