"""A chat as the text that its model was trained on: the tokenizer's own template, rendered as transformers does, in
jinja's sandbox, so that a template can reach nothing but what it is given. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tplaunch.data.beside import TOKENIZER_CONFIG, read_beside, token_text
from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = "chat_template.jinja"


def read_template(tokenizer: Path) -> str:
    """The chat template beside a tokenizer: its own file, else the one in `tokenizer_config.json` (of several, the one
    named default).

    Raises:
        TplaunchError: there is none, or it cannot be read.
    """
    path = tokenizer.with_name(TEMPLATE)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TplaunchError(Problem(f"{path} cannot be read", why=str(error))) from None
    found = read_beside(tokenizer, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
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
    from jinja2 import TemplateError

    said = {**read_beside(tokenizer, "special_tokens_map.json"), **read_beside(tokenizer, TOKENIZER_CONFIG)}
    tokens = {name: text for name in said if name.endswith("_token") and (text := token_text(said[name])) is not None}
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **tokens}  # as transformers gives it
    try:
        made = _environment().from_string(template)
        return [made.render(messages=chat, **given) for chat in chats]
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"the chat template of {tokenizer.parent} cannot be followed"
        raise TplaunchError(Problem(what, why=str(error), fix="mend the messages, or the template")) from None


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

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
