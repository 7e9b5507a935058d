"""A recipe file -> a checked `Recipe` that knows where each of its values came from; and back to YAML."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from tplaunch.errors import Problem, RecipeError
from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.shipped import find_recipe, shipped_recipes
from tplaunch.recipe.tree import BROKEN, Dumper, Tree, merge, parse

MAX_BYTES = 1024 * 1024


class LoadedRecipe(NamedTuple):
    """A recipe and where it was said.

    Attributes:
        recipe: the values, defaults and preset filled in; paths under `data` are absolute.
        path: the file.
        origins: dotted key -> "file:line:column", "--set", "preset NAME" or "default".
    """

    recipe: Recipe
    path: Path
    origins: dict[str, str]

    def where(self, key: str) -> str:
        """Where a key's value was said; "" for a default."""
        origin = self.origins.get(key, "default")
        return "" if origin == "default" else origin


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe with what it extends, then `--set` values over it and its preset beneath.

    Args:
        path: the YAML file, or the name of a recipe that ships (`quickstart`, `recipes/quickstart.yaml`).
        overrides: `a.b=value` texts, the values in YAML; the last one wins.

    Raises:
        RecipeError: holds every problem that was found.
    """
    path = find_recipe(path)
    problems: list[Problem] = []
    tree = _read(path, (), problems)
    if tree is None:
        raise RecipeError(*problems)
    for text in overrides:
        tree = _over(tree, _parse_override(text, problems))
    tree = _absolute_paths(_fill_preset(tree, problems))
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        from tplaunch.recipe.explain import explain  # a sound recipe needs no explanation

        problems += explain(error, tree)
    if problems:
        raise RecipeError(*sorted(problems, key=_reading_order))
    origins = {key: node.key_origin if isinstance(node.value, dict) else node.origin for key, node in tree.walk()}
    origins.update({key: "default" for key in _leaves(recipe) if key not in origins})
    return LoadedRecipe(recipe, path, origins)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every value stated; `load_recipe` reads it back equal."""
    return yaml.dump(recipe.model_dump(by_alias=True), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _reading_order(problem: Problem) -> tuple[str, int, int]:
    """File, line and column of a problem as numbers; problems without them come first in their file."""
    file, line, column = (*problem.where.rsplit(":", 2), "", "")[:3]
    return (file, int(line), int(column)) if line.isdigit() and column.isdigit() else (problem.where, 0, 0)


def _leaves(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """The dotted key of every value that is not itself a section."""
    for name, field in type(section).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{key}.")
        else:
            yield key


def _read(path: Path, extending: tuple[Path, ...], problems: list[Problem]) -> Tree | None:
    """One file merged over what it extends; None where any of them holds no recipe at all."""
    tree = _read_mapping(path, problems)
    if tree is None or (base := tree.child("extends")) is None:
        return tree
    tree = tree._replace(value={key: child for key, child in tree.value.items() if key != "extends"})
    if base.value is BROKEN:
        return tree
    if not isinstance(base.value, str) or not base.value:
        problems.append(Problem("must be the path of one recipe", where=base.origin, key="extends"))
        return tree
    beside = Path(base.folder) if _handed_over(path) else path.parent
    target, chain = beside / base.value, (*extending, path)
    if any(target.resolve() == other.resolve() for other in chain):
        way = " -> ".join(map(str, (*chain, target)))
        problems.append(Problem(f"extends itself: {way}", fix="remove one link", where=base.origin, key="extends"))
        return tree
    beneath = _read(target, chain, problems)
    return None if beneath is None else _over(beneath, tree)


# Of a section, keys that say the same thing in other ways.
_WAYS = [
    ("training", ({"steps"}, {"tokens"}, {"samples"})),
    ("training", ({"batch_ramp_up"}, {"batch_schedule"})),
    ("lr_schedule", ({"pieces"}, {"warmup_steps", "decay", "decay_steps", "min_lr"})),
]


def _over(base: Tree, over: Tree) -> Tree:
    """`base` with what `over` says in its place, also where it says it in another way."""
    for section, ways in _WAYS:
        new, old = over.child(section), base.child(section)
        if new is None or old is None or not isinstance(new.value, dict) or not isinstance(old.value, dict):
            continue
        said = [way for way in ways if any(key in way and node.value is not None for key, node in new.value.items())]
        others: set[str] = set().union(*(way for way in ways if way not in said)) if said else set()
        kept = {key: child for key, child in old.value.items() if key not in others}
        base = base._replace(value={**base.value, section: old._replace(value=kept)})
    return merge(base, over)


def _read_mapping(path: Path, problems: list[Problem]) -> Tree | None:
    """One file, which must hold a mapping."""
    start = "write a first recipe with `tplaunch recipe new`"
    text = _read_text(path, problems)
    if text is None:
        return None
    folder = Path.cwd() if _handed_over(path) else path.absolute().parent
    tree, found = parse(text, str(path), str(folder))
    problems += found
    if tree is None and not found:
        problems.append(Problem("the file is empty", fix=start, where=str(path)))
    elif tree is not None and not isinstance(tree.value, dict):
        problems.append(Problem("a recipe is a mapping of keys to values", fix=start, where=tree.origin))
        return None
    return tree


def _read_text(path: Path, problems: list[Problem]) -> str | None:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not (stat.S_ISREG(os.fstat(file.fileno()).st_mode) or _handed_over(path)):
                problems.append(Problem("is not a regular file: a recipe is one, or standard input", where=str(path)))
                return None
            os.set_blocking(file.fileno(), True)
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        problems.append(_cannot_read(path, error))
        return None
    if len(raw) > MAX_BYTES:
        problems.append(Problem(f"larger than {MAX_BYTES} bytes: not a recipe", where=str(path)))
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        what = f"byte {raw[error.start]:#04x} is not UTF-8"
        problems.append(Problem(what, fix="save the file as UTF-8", where=f"{path}:{line}:{column}"))
        return None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a writer, which a FIFO may never get."""
    return os.open(path, flags | os.O_NONBLOCK)


def _handed_over(path: Path) -> bool:
    """Whether it is a pipe or file that this process was started with: `/dev/stdin`, or a shell's `<(...)`."""
    return re.fullmatch(r"/dev/stdin|/(dev|proc/self)/fd/\d+", str(path)) is not None


def _cannot_read(path: Path, error: OSError | ValueError) -> Problem:
    if isinstance(error, FileNotFoundError):
        near = difflib.get_close_matches(path.stem, shipped_recipes(), n=1)
        fix = f"did you mean the recipe {near[0]}?" if near else "`tplaunch recipe list` shows the recipes that ship"
        return Problem("no such file", fix=fix, where=str(path))
    if isinstance(error, IsADirectoryError):
        return Problem("is a directory, not a recipe file", where=str(path))
    return Problem(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path))


def _parse_override(text: str, problems: list[Problem]) -> Tree:
    """`a.b=v` as the tree {a: {b: v}}."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    nothing = Tree({}, "--set")
    if not equals or not all(names):
        problems.append(Problem(f"{text!r} is not KEY=VALUE", fix="such as --set training.steps=20", where="--set"))
        return nothing
    if names == ["extends"]:
        problems.append(Problem("cannot be set", fix="write it in the file", where="--set", key="extends"))
        return nothing
    tree, found = parse(value, "--set", os.getcwd(), positions=False)
    problems += [replace(problem, key=key) for problem in found]
    tree = tree or Tree(BROKEN if found else None, "--set")  # nothing after the = is null
    for name in reversed(names):
        tree = Tree({name: tree._replace(key_origin="--set")}, "--set", "--set")
    return tree


def _fill_preset(tree: Tree, problems: list[Problem]) -> Tree:
    """The tree over the fields of its `model.preset`."""
    model = tree.child("model")
    preset = model.child("preset") if model is not None else None
    if preset is None or not isinstance(preset.value, str):
        return tree
    name = preset.value
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
        problems.append(Problem(f"unknown preset {name!r}", fix=fix, where=preset.origin, key="model.preset"))
        name = next(iter(PRESETS))  # a stand-in, so that its fields are not reported as missing, too
    return merge(Tree.of({"model": PRESETS[name]}, f"preset {name}"), tree)


# Sections, their keys that hold paths, and how a value ends that is a path.
_PATHS = [
    ("data", ("train", "validation", "tokenizer"), ""),
    ("eval", ("tasks",), ""),
    ("checkpoint", ("initial",), ""),
    ("finetune", ("chat_template",), ""),
    ("hardware", ("gpu",), ".json"),
]


def _absolute_paths(tree: Tree) -> Tree:
    """The tree with its paths made absolute, each from the folder of the file that says it."""
    if not isinstance(tree.value, dict):
        return tree
    sections = dict(tree.value)
    for section, keys, ending in _PATHS:
        holder = sections.get(section)
        if holder is not None and isinstance(holder.value, dict):
            values = {key: _absolute(node, ending) if key in keys else node for key, node in holder.value.items()}
            sections[section] = holder._replace(value=values)
    training = sections.get("training")
    stages = training.child("stages") if training is not None and isinstance(training.value, dict) else None
    if training is not None and stages is not None and isinstance(stages.value, list):
        found = stages._replace(value=[_with_data(stage) for stage in stages.value])
        sections["training"] = training._replace(value={**training.value, "stages": found})
    return tree._replace(value=sections)


def _with_data(stage: Tree) -> Tree:
    """A stage whose paths of text are absolute."""
    data = stage.child("data") if isinstance(stage.value, dict) else None
    if data is None or not isinstance(data.value, dict) or "train" not in data.value:
        return stage
    moved = data._replace(value={**data.value, "train": _absolute(data.value["train"], "")})
    return stage._replace(value={**stage.value, "data": moved})


def _absolute(node: Tree, ending: str, *, listed: bool = False) -> Tree:
    if isinstance(node.value, str) and node.value and node.value.endswith(ending):
        return node._replace(value=os.path.normpath(os.path.join(node.folder, os.path.expanduser(node.value))))
    if isinstance(node.value, list):
        return node._replace(value=[_absolute(child, ending, listed=True) for child in node.value])
    if isinstance(node.value, dict):
        keys = [key for key in ("path", "data", "choices") if key in node.value] if listed else ["path"]
        if not listed and "path" not in node.value:  # named
            keys = list(node.value)
        return node._replace(value={**node.value, **{key: _absolute(node.value[key], ending) for key in keys}})
    return node
