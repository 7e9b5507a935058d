"""`tplaunch recipe`: look at recipes, check them, start one."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption, RecipeArgument, SetOption
from tplaunch.errors import Exit, Problem, RecipeError, TplaunchError

if TYPE_CHECKING:
    from tplaunch.check.recipe import Checked
    from tplaunch.recipe.load import LoadedRecipe

app = typer.Typer(help="List, show, check and start recipes.", no_args_is_help=True)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the recipes that ship and the model presets.

    Example: tplaunch recipe list
    """
    from tplaunch.recipe.presets import PRESETS
    from tplaunch.recipe.schema import Model
    from tplaunch.recipe.shipped import shipped_recipes
    from tplaunch.spec.parameters import active_parameter_count, parameter_count
    from tplaunch.units import format_count

    recipes = {name: _first_comment(path) for name, path in shipped_recipes().items()}
    models = {name: Model.model_validate(fields) for name, fields in PRESETS.items()}
    if as_json:
        echo_json({"recipes": recipes, "presets": {name: parameter_count(model) for name, model in models.items()}})
        return
    typer.echo("Recipes (tplaunch train NAME):")
    typer.echo(_columns(recipes.items(), width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    typer.echo("\nModel presets (model: {preset: NAME}):")

    def sizes(model: Model) -> str:
        active = f", {format_count(active_parameter_count(model))} active" if model.moe else ""
        return f"{format_count(parameter_count(model))} parameters{active}"

    typer.echo(_columns((name, sizes(model)) for name, model in models.items()))


@app.command()
def show(recipe: RecipeArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Print every value of a recipe and where it came from.

    Example: tplaunch recipe show quickstart --set topology.tp=4
    """
    from tplaunch.recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    if as_json:
        values = loaded.recipe.model_dump(mode="json", by_alias=True)
        echo_json({"path": str(loaded.path), "recipe": values, "origins": loaded.origins})
    else:
        typer.echo(_annotated(loaded))


@app.command()
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="GPUs that the whole run can have.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe without running it. Missing data files are warnings here.

    Example: tplaunch recipe check recipes/quickstart.yaml
    """
    from tplaunch.check.data import missing_files
    from tplaunch.check.recipe import check_recipe
    from tplaunch.recipe.load import load_recipe

    try:
        checked = check_recipe(load_recipe(recipe, set_ or ()), gpus=gpus, need_data=False)
    except RecipeError as error:
        if not as_json:
            raise
        echo_json({"ok": False, "problems": [dataclasses.asdict(problem) for problem in error.problems]})
        raise typer.Exit(Exit.USAGE) from None
    report, unseen = _report(checked), [problem.key for problem in missing_files(checked.recipe)]
    if as_json:
        warnings = [dataclasses.asdict(problem) for problem in checked.warnings]
        echo_json({"ok": True, **report, "not_looked_at": unseen, "warnings": warnings})
        return
    but = f", but for what could not be looked at: {', '.join(unseen)}" if unseen else ""
    typer.echo(f"{checked.recipe.name}: ok{but}")
    typer.echo(_columns((key.replace("_", " "), _text(value)) for key, value in report.items()))
    for warning in checked.warnings:
        typer.echo(f"warning: {warning}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    With it they complete and check them.

    Example: tplaunch recipe schema > recipe.schema.json
    """
    from tplaunch.recipe.explain import editor_json_schema

    echo_json(editor_json_schema())


@app.command()
def new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a first recipe, with comments, to start from.

    Example: tplaunch recipe new my-run.yaml
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_starter(path.stem))
    except FileExistsError:
        raise TplaunchError(Problem("is there already", fix="name another file", where=str(path))) from None
    except (OSError, ValueError) as error:
        raise TplaunchError(Problem(f"cannot be written: {error}", where=str(path))) from None
    typer.echo(f"wrote {path}; next: tplaunch recipe check {shlex.quote(str(path))}")


def _annotated(loaded: LoadedRecipe) -> str:
    """The whole recipe as YAML, every value with a comment that says where it came from."""
    from tplaunch.recipe.load import dump_recipe
    from tplaunch.recipe.tree import parse

    text = dump_recipe(loaded.recipe)
    tree, _ = parse(text, "", "")
    assert tree is not None, "it was just dumped"
    origins = {}
    for key, node in tree.walk():
        if not isinstance(node.value, dict) and key in loaded.origins:
            origins[int(node.key_origin.split(":")[1])] = loaded.origins[key]
    lines = text.splitlines()
    width = max(len(line) for line in lines if len(line) <= 60)
    return "\n".join(f"{line:<{width}}  # {origins[n]}" if n in origins else line for n, line in enumerate(lines, 1))


def _starter(name: str) -> str:
    """The text of a first recipe, with comments."""
    from tplaunch import recipe

    text = (Path(recipe.__file__).parent / "starter.yaml").read_text(encoding="utf-8")
    name = re.sub("[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "starter"
    return text.replace("name: starter\n", f"name: {name}\n")


def _report(checked: Checked) -> dict[str, Any]:
    """The figures of a checked recipe, in the order in which they are printed."""
    from tplaunch.spec.course import Course
    from tplaunch.spec.parameters import active_parameter_count, parameter_count

    topology, training, model = checked.topology, checked.recipe.training, checked.recipe.model
    return {
        "world_size": topology.world_size,
        **{axis: topology.size(axis) for axis in ("tp", "cp", "pp", "dp") if axis in topology.axes},
        **{axis: topology.size(axis) for axis in topology.expert_axes},
        "nodes": topology.nodes,
        "gpus_per_node": topology.ranks_per_node,
        "stage_layers": checked.recipe.topology.stage_layers,
        "microbatches": training.global_batch_size // (topology.dp * training.micro_batch_size),
        "parameters": parameter_count(model),
        **({"active_parameters": active_parameter_count(model)} if model.moe else {}),
        "tokens": Course(checked.recipe).tokens,
    }


def _text(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"


def _first_comment(path: Path) -> str:
    """What a recipe says of itself: the first sentence, whole, of the comment that it begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ").rstrip() for line in lines)
    return re.split(r"(?<=[.!?])(?<!et al\.)(?<!e\.g\.)\s", text, maxsplit=1)[0]


def _columns(rows: Iterable[tuple[str, str]], *, width: int | None = None) -> str:
    """Names and texts; a text that is wider than `width` goes on below itself. None: no line is broken."""
    rows = list(rows)
    names = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, text in rows:
        room = max(20, width - names - 4) if width else 0
        first, *more = (textwrap.wrap(text, room, break_on_hyphens=False) if room else []) or [text]
        lines += [f"  {name:<{names}}  {first}".rstrip(), *(f"{'':<{names + 4}}{part}" for part in more)]
    return "\n".join(lines)
