"""`tplaunch recipe`: look at recipes and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show, check and start recipes.", no_args_is_help=True)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value.")]


@app.command()
def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe.

    Example: tplaunch recipe check recipes/quickstart.yaml
    """
    from tplaunch.recipe.load import load_recipe

    load_recipe(recipe, set_ or ())
    typer.echo(f"{recipe}: ok")
