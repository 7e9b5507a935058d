"""That following a mend helps."""

from __future__ import annotations

import re
from pathlib import Path

from tplaunch.check.recipe import check_recipe
from tplaunch.errors import Problem, RecipeError
from tplaunch.recipe.load import load_recipe


def problems_of(path: Path, overrides: list[str]) -> list[Problem]:
    """What the checks refuse of a recipe, whose data need not be there."""
    try:
        check_recipe(load_recipe(path, overrides), need_data=False)
    except RecipeError as error:
        return error.problems
    return []


def follow_first_mends(path: Path, overrides: list[str]) -> bool:
    """Follow the first "KEY: VALUE" of each problem by itself: it must be there, and make that problem go away.

    Returns:
        Whether there was a problem.
    """
    found = problems_of(path, overrides)
    for problem in found:
        mend = re.match(r"(\w+): (?:at most )?(\d+)", problem.fix)
        assert mend is not None, problem
        section = problem.key.rpartition(".")[0]
        left = problems_of(path, [*overrides, f"{section}.{mend[1]}={mend[2]}"])
        assert (problem.key, problem.what) not in [(p.key, p.what) for p in left]
    return bool(found)
