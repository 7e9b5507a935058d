"""Write the pages of `docs/reference` again, from the commands and the recipe as they are in the code.

python docs/reference.py       `tests/docs/test_reference.py` fails where it was not run after a change

It writes README's table of model families again, too.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
sys.path[:0] = [str(HERE.parent)]

from typer.main import get_command  # noqa: E402

from tplaunch.cli.app import app  # noqa: E402
from tplaunch.errors import Exit  # noqa: E402
from tplaunch.huggingface.families import HAS, READ  # noqa: E402
from tplaunch.recipe.explain import in_words  # noqa: E402
from tplaunch.recipe.presets import PRESETS  # noqa: E402
from tplaunch.recipe.schema import Family, Recipe  # noqa: E402

MADE = "<!-- Made by `python docs/reference.py`: not to be edited. -->\n"
_TABLE = re.compile(r"(<!-- families: [^>]*-->\n).*?(<!-- end of families -->)", re.DOTALL)
_TYPE = re.compile(r" <[\w\[\]]+>$")  # what Typer appends to the name of an argument


def pages() -> dict[Path, str]:
    """Each generated page by its path."""
    folder = HERE / "reference"
    return {
        folder / "commands.md": commands_page(),
        folder / "recipe.md": recipe_page(),
        folder / "families.md": families_page(),
        README: readme(README.read_text(encoding="utf-8")),
    }


def commands_page() -> str:
    """Every command with its arguments, options, defaults and example, and the exit codes."""
    root = get_command(app)
    parts = [MADE, "# Commands\n", f"{root.help}\n"]
    parts += [_table(("option", "meaning", "default"), _parameters(root, None))]
    parts += ["## Exit codes\n", _table(("code", "meaning"), ((f"`{int(code)}`", code.meaning) for code in Exit))]
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            parts += [f"## tplaunch {name}\n", f"{command.help}\n"]
            for inner, one in command.commands.items():
                parts += [f"### tplaunch {name} {inner}\n", *_command(f"tplaunch {name} {inner}", one)]
        else:
            parts += [f"## tplaunch {name}\n", *_command(f"tplaunch {name}", command)]
    return "\n".join(parts)


def _command(path: str, command: Any) -> Iterator[str]:
    context = command.make_context(path, [], resilient_parsing=True)
    text, _, example = command.help.partition("Example: ")
    yield _one_line_a_paragraph(text)
    yield _table(("argument or option", "meaning", "default"), _parameters(command, context))
    yield f"```bash\n{' '.join(example.split())}\n```\n"


def _one_line_a_paragraph(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n")) + "\n"


def _parameters(command: Any, context: Any) -> Iterator[tuple[str, ...]]:
    """What `--help` says of each parameter; what it appends in brackets has a column of its own."""
    context = context or command.make_context("tplaunch", [], resilient_parsing=True)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in record[0] or "completion" in record[0]:
            continue
        names, text = record
        text, _, extra = text.partition("  [")
        default = "; ".join(f"`{part.strip()}`" for part in extra.removesuffix("]").split(";") if part)
        default = default.replace("`default: ", "`").replace("`required`", "required")
        yield f"`{_TYPE.sub('', names)}`", text, default


def families_page() -> str:
    """The architectures of transformers that are read and written, by the fields of `model`."""
    rows = []
    for family, has in HAS.items():
        always = ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in has.own.items())
        told = ", ".join(f"`{name}`" for name in sorted(has.free))
        rows.append((f"`{family.model_type}`", family.architecture, always or "as a recipe that says none", told))
    text = (
        "What of a `config.json` is read as which key of `model`, beside sizes, norm_eps, rope_theta, tie_embeddings "
        "and init_std, which all have, and `moe` stands for its sizes. A value that the last columns have no room for "
        "is refused, by name. `export` writes the first family that computes the model, or `model.family`.\n"
    )
    head = ("model_type", "class", "always", "as its config.json says")
    return "\n".join([MADE, "# Model families\n", text, _table(head, rows)])


def readme(text: str) -> str:
    """README with its table of families as it should be."""
    rows = []
    for family, has in HAS.items():
        needs = [name for name in (*has.own, *sorted(has.free)) if "." not in name and name not in _ALL_HAVE]
        read, written = READ.get(family.model_type) == family, family.model_type in get_args(Family)
        needed = ", ".join(f"`{name}`" for name in needs)
        rows.append((family.models, f"`{family.model_type}`", _mark(read), _mark(written), needed or "nothing"))
    table = _table(("models", "model_type", "import", "export", "of `model`, beside Llama's sizes"), rows)
    assert _TABLE.search(text)
    return _TABLE.sub(lambda found: found[1] + table + found[2], text)


_ALL_HAVE = {"rope_scaling"}


def _mark(yes: bool) -> str:
    return "yes" if yes else "no"


def recipe_page() -> str:
    """Every key with what it takes, its default and its meaning, section by section."""
    schema = Recipe.model_json_schema()
    parts = [
        MADE,
        "# Recipe\n",
        "Every key of a recipe. `null` as a default: what the meaning says, or nothing. Counts may be written `1B`, "
        "durations `2h`. `extends: FILE` at the top merges a recipe over another; `--set KEY=VALUE` changes a dotted "
        "key on the command line.\n",
    ]
    parts += _section("", schema, schema)
    parts += ["## Presets\n", f"Names for `model.preset`: {', '.join(f'`{name}`' for name in PRESETS)}.\n"]
    return "\n".join(parts)


def _section(key: str, section: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """A mapping's keys as a table, then the mappings inside of it."""
    if key:
        yield f"##{'#' * key.count('.')} {key}\n"
        if "description" in section:
            yield _one_line_a_paragraph(section["description"])
    required, inner = set(section.get("required", ())), []
    rows = []
    for name, field in section["properties"].items():
        dotted = f"{key}.{name}" if key else name
        below = list(_mappings(dotted, field, schema))
        inner += below
        takes = in_words(field, schema)
        for place, mapping in below:
            words = in_words(mapping, schema)
            takes = takes.replace(words, f"[a mapping](#{place.replace('.', '').replace('[]', '')})")
        default = field.get("default")
        shown = "required" if name in required else "its own" if default == {} and below else f"`{json.dumps(default)}`"
        rows.append((f"`{name}`", takes.replace(" or null", ""), shown, field.get("description", "")))
    yield _table(("key", "takes", "default", "meaning"), rows)
    for place, mapping in inner:
        yield from _section(place, mapping, schema)


def _mappings(key: str, field: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections that a value, or an item of it, can be."""
    if "$ref" in field:
        yield key, schema["$defs"][field["$ref"].rpartition("/")[2]]
    for member in field.get("anyOf", ()):
        yield from _mappings(key, member, schema)
    if "items" in field:
        yield from _mappings(f"{key}[]", field["items"], schema)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in lines)


def _cell(text: str) -> str:
    """A cell's text. Markdown's dialects disagree on a bar in code, HTML's they all know."""
    text = re.sub(r"`([^`]*\|[^`]*)`", lambda code: f"<code>{html.escape(code[1], quote=False)}</code>", text)
    return text.replace("|", "&#124;")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
