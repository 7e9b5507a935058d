"""Recipes that come with the program, by name."""

from __future__ import annotations

import os
from pathlib import Path


def recipes_folder() -> Path:
    """Where they are: inside the package when it was installed, beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The files by their names without ending."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: Path | str) -> Path:
    """The file that a name on the command line means.

    A file of that name wins; then a recipe that ships, called `quickstart`, `quickstart.yaml` or
    `recipes/quickstart.yaml`. Anything else comes back as it is, for the reader to report.
    """
    path = Path(name)
    if os.path.isfile(path) or path.parent not in (Path(), Path("recipes")):
        return path
    return shipped_recipes().get(path.name.removesuffix(".yaml"), path)
