"""The layering that CONTRIBUTING states, held against every import; and what docs name, held against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from tplaunch.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tplaunch"
# Modules of packages on the trainer's side, or between the halves, that the front imports: they load no torch.
WITHOUT_TORCH = {
    *("checkpoint.store", "checkpoint.fit", "checkpoint.origin", "optim.lr", "bench.run", "generate.run"),
    *("evaluate.run", "evaluate.text", "evaluate.choices"),
    *("train.straggler", "train.spike"),
}
FRONT = (
    "errors",
    "units",
    "files",
    "machine",
    "streams",
    "sparkline",
    "recipe",
    "spec",
    "run",
    "check",
    "plan",
    "launch",
)
FRONT += ("slurm", "report", "cli")


def layers() -> dict[str, int]:
    """Package -> its floor, from the list in CONTRIBUTING."""
    listing = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    rows = [re.split(r"\s{2,}", line.strip())[0].split() for line in listing.strip().splitlines()]
    return {name: floor for floor, names in enumerate(rows) for name in names}


def imports(path: Path, *, only_at_start: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted module below tplaunch) of each import of our own modules.

    Args:
        only_at_start: leave out imports that run later (in functions) or never (TYPE_CHECKING).
    """
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tplaunch"):
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}".removeprefix("tplaunch.")
                whole = PACKAGE / f"{name.replace('.', '/')}.py"
                yield node.lineno, name if whole.exists() else module.removeprefix("tplaunch.")
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if not (only_at_start and deferred):
            pending += ast.iter_child_nodes(node)


def modules() -> dict[str, Path]:
    """Dotted name below tplaunch -> file."""
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


MODULES = modules()


def test_every_package_has_its_floor() -> None:
    found = {name.split(".")[0] for name in MODULES} - {"__main__"}
    assert found == layers().keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    floors = layers()
    if name == "__main__":
        return
    own = name.split(".")[0]
    for line, module in imports(MODULES[name]):
        other = module.split(".")[0]
        if other == own or module in ("tplaunch", ""):
            continue
        assert floors[other] <= floors[own], f"{MODULES[name]}:{line} imports {module}, which is above it"
        assert floors[other] < floors[own] or name.count(".") == 0 or other in ("errors", "units", "files"), (
            f"{MODULES[name]}:{line} imports {module}, which is beside it"
        )


def test_no_module_is_part_of_a_circle() -> None:
    arrows = {name: {module for _, module in imports(path)} & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for module in arrows[name]:
                visit(module, (*above, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def test_the_front_imports_no_torch() -> None:
    """What is imported when a front module is: followed through all that it imports at its start."""
    arrows = {
        name: {module for _, module in imports(path, only_at_start=True)} & MODULES.keys()
        for name, path in MODULES.items()
    }
    views_of_simulate = "cli.views.simulation"  # made of ranks that were simulated, with torch
    waiting = [n for n in MODULES if (n.split(".")[0] in FRONT or n in WITHOUT_TORCH) and n != views_of_simulate]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += arrows[name]
    for name in sorted(reached):
        assert not _imports_torch(MODULES[name]), f"{name} imports torch, and the front imports it"


def _imports_torch(path: Path) -> bool:
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "torch" for name in names):
            return True
    return False


def private_names(path: Path) -> Iterator[str]:
    """Names of torch that begin with an underscore, imported or reached by a dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if any(part.startswith("_") for part in [*(node.module or "").split("."), alias.name])
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] in ("torch", "dist", "distributed_c10d") and not owner.startswith("torch.ops"):
                yield f"{owner}.{node.attr}"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"torch_private"}))
def test_private_names_of_torch_are_in_one_file(name: str) -> None:
    assert list(private_names(MODULES[name])) == []


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted keys of recipes."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from recipe_keys(kind, f"{prefix}{name}.")


def in_our_code(name: str) -> bool:
    """Whether a dotted name below tplaunch is a package, a module, or defined in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        file = PACKAGE.joinpath(*parts[:count])
        if file.is_dir() and count == len(parts):
            return True
        if (module := file.with_suffix(".py")).is_file():
            text = module.read_text()
            return all(re.search(rf"\b(def|class) {part}\b|^ *{part}\b *[:=]", text, re.M) for part in parts[count:])
    return False


DOCS = [*ROOT.glob("*.md"), *(path for top in ("tplaunch", "tests") for path in (ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_docs_name_is_there(path: Path) -> None:
    """Files of this repository; and dotted names in backticks that begin as a package of ours or a recipe's section."""
    text, keys = path.read_text(), {*recipe_keys(), "model.preset"}
    for file in re.findall(r"(?<![\w/])(?:tests|tplaunch|slurm|recipes)/[\w/-]+\.(?:py|md|yaml|sbatch|txt)\b", text):
        assert (ROOT / file).exists(), file
    for name in re.findall(r"`(?:tplaunch\.)?([a-z_]+(?:\.[A-Za-z_]+)+)`", text):
        ours = (PACKAGE / name.split(".")[0]).is_dir() or name.split(".")[0] in MODULES
        if ours and name.split(".")[-1] not in ("yaml", "json", "py"):
            assert in_our_code(name) or name in keys, name
