"""YAML text -> a tree of values that know where they were said; nothing is executed or guessed.

The scalars are those of the YAML 1.2 core schema: `3e-4` is a number, `no` is text, and only
`true` and `false` are booleans. Beyond what YAML itself forbids, these are refused, each with its
place: duplicate keys, keys that are not text, tags, merge keys, numbers that are not finite,
aliases of themselves, and files whose aliases expand without bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from tplaunch.errors import Problem

MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_DIGITS = 40

BROKEN = object()  # stands for a value that has been reported already
_TAG = "tag:yaml.org,2002:"
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


class Tree(NamedTuple):
    """One value of a recipe: a dict or list of trees, or a scalar.

    `origin` and `key_origin` say where the value and its key stand: "file:line:column", "--set" or
    "preset NAME". Relative paths in the value are relative to `folder`.
    """

    value: Any
    origin: str
    key_origin: str = ""
    folder: str = ""

    def plain(self) -> Any:
        """The bare value."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    @classmethod
    def of(cls, value: Any, origin: str) -> Tree:
        """The tree of a bare value that has one origin."""
        if isinstance(value, dict):
            value = {key: cls.of(child, origin) for key, child in value.items()}
        elif isinstance(value, list):
            value = [cls.of(child, origin) for child in value]
        return cls(value, origin, origin)

    def child(self, key: str | int) -> Tree | None:
        """The tree under a key or index, if there is one."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None

    def walk(self, key: str = "") -> Iterator[tuple[str, Tree]]:
        """Every value with its dotted key, such as `data.train[0].path`; sections before their content."""
        if key:
            yield key, self
        if isinstance(self.value, dict):
            for name, child in self.value.items():
                yield from child.walk(f"{key}.{name}" if key else name)
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk(f"{key}[{index}]")


def merge(base: Tree, over: Tree) -> Tree:
    """`base` with what `over` says in its place: mappings key by key, all else (lists too) whole.

    A merged mapping stands where `over` says it, except that a file is better than "--set".
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return (base if over.origin == "--set" else over)._replace(value=merged)


_CORE_SCHEMA = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
]


def _stop(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    """For what makes reading on senseless."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """Composes nodes only (no objects), with the core schema, bounded depth and no self-reference."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.open_anchors: set[str] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.open_anchors:
                raise _stop(f"alias *{event.anchor} stands for a value that contains it", event.start_mark)
            return super().compose_node(parent, index)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _stop(_TOO_DEEP, event.start_mark)
        self.open_anchors.add(event.anchor)
        node = super().compose_node(parent, index)
        self.open_anchors.discard(event.anchor)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Writes text that this module reads back as the same values, quoting what YAML 1.1 would take for another."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Only double quotes keep the line breaks of Unicode; PyYAML folds them in other styles.
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar(_TAG + "str", text, style=style)


Dumper.add_representer(str, Dumper.represent_text)


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


@dataclass
class _Builder:
    """Turns composed nodes into a tree and gathers what is wrong with them."""

    name: str  # the file, or "--set" for a value from the command line
    folder: str
    positions: bool
    problems: list[Problem] = field(default_factory=list)
    values: int = 0
    depth: int = 0

    def place(self, mark: yaml.Mark) -> str:
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}" if self.positions else self.name

    def refuse(self, mark: yaml.Mark, key: str, what: str, fix: str = "") -> Any:
        self.problems.append(Problem(what, fix=fix, where=self.place(mark), key=key))
        return BROKEN

    def build(self, node: yaml.Node, key: str, key_mark: yaml.Mark | None = None) -> Tree:
        # Aliases are expanded here, so both bounds hold for what they stand for, too.
        self.values, self.depth = self.values + 1, self.depth + 1
        if self.values > MAX_VALUES:
            raise _stop(f"more than {MAX_VALUES} values after its aliases are expanded", node.start_mark)
        if self.depth > MAX_DEPTH:
            raise _stop(_TOO_DEEP, node.start_mark)
        mark = node.start_mark
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            value: Any = self.mapping(node, key)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            value = [self.build(child, f"{key}[{index}]") for index, child in enumerate(node.value)]
        elif isinstance(node, yaml.ScalarNode):
            value = self.scalar(node, key)
        else:
            value = self.refuse_tag(node, key)
        self.depth -= 1
        return Tree(value, self.place(mark), self.place(key_mark or mark), self.folder)

    def mapping(self, node: yaml.MappingNode, section: str) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            name = self.scalar(key_node, section) if isinstance(key_node, yaml.ScalarNode) else None
            key = f"{section}.{name}" if section else str(name)
            if name is BROKEN:
                continue
            if not isinstance(name, str):
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.refuse(mark, section, f"a key must be text, not {text}", "put the key in quotes")
            elif not name.isprintable():
                self.refuse(mark, section, f"the key {name!r} has characters that cannot be shown", "remove them")
            elif name == "<<" and key_node.style is None:
                fix = "use `extends: base.yaml`, or repeat the keys"
                self.refuse(mark, section, "merge keys (<<) are not supported", fix)
            elif name in found:
                self.refuse(mark, key, f"given twice, first at {found[name].key_origin}", "keep one of them")
            else:
                found[name] = self.build(value_node, key, mark)
        return found

    def scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        text, mark = node.value, node.start_mark
        kind = node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "str":
            if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
                what = "text with a NUL or half of a surrogate pair"
                return self.refuse(mark, key, what, "remove that character")
            return text
        if kind in ("int", "float"):
            return self.number(kind, text.replace("_", ""), mark, key)
        return self.refuse_tag(node, key)

    def number(self, kind: str, text: str, mark: yaml.Mark, key: str) -> Any:
        if len(text) > MAX_DIGITS:
            return self.refuse(mark, key, f"a number of {len(text)} characters", f"use at most {MAX_DIGITS}")
        try:
            if kind == "int":
                return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
            number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return self.refuse(mark, key, f"{text!r} is not a number")
        if not math.isfinite(number):
            return self.refuse(mark, key, f"{text} is not a finite number", "write a finite number")
        return number

    def refuse_tag(self, node: yaml.Node, key: str) -> Any:
        tag = node.tag.replace(_TAG, "!!")
        return self.refuse(node.start_mark, key, f"the YAML tag {tag!r} is not allowed here", "remove the tag")


def parse(text: str, name: str, folder: str, *, positions: bool = True) -> tuple[Tree | None, list[Problem]]:
    """Read one YAML document.

    Args:
        text: the document.
        name: what stands before line and column in places; alone in them without `positions`.
        folder: what relative paths in the document are relative to.
        positions: whether places have line and column.

    Returns:
        The tree (None when the document is empty or is not YAML) and everything that is wrong with it.
    """
    builder = _Builder(name, folder, positions)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = None if node is None else builder.build(node, "")
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position) - 1
        mark = yaml.Mark(name, error.position, line, column, None, 0)
        builder.refuse(mark, "", f"the control character {chr(error.character)!r} is not allowed", "remove it")
        return None, builder.problems
    except yaml.MarkedYAMLError as error:
        what, fix = _explain_syntax(error)
        builder.refuse(error.problem_mark or error.context_mark or loader.get_mark(), "", what, fix)
        return None, builder.problems
    except (ValueError, OverflowError) as error:  # from the scanner: an escape outside Unicode, a huge %YAML version
        builder.refuse(loader.get_mark(), "", f"not valid YAML: {error}")
        return None, builder.problems
    return tree, builder.problems


def _explain_syntax(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    problem = error.problem or "cannot be read"
    if r"'\t'" in problem:
        return "a tab where YAML wants spaces", "indent with spaces"
    if "mapping values are not allowed" in problem:
        return f"not valid YAML: {problem}", "put a value that holds ': ' in quotes, or check the indentation"
    if "expected a single document" in (error.context or ""):
        return "a second YAML document", "keep one document (one `---` at most)"
    return f"not valid YAML: {problem}" + (f" {error.context}" if error.context else ""), ""
