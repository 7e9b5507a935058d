"""Steps between checking a recipe and launching it: run directory, resume check, data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.fit import model_differences
from tplaunch.checkpoint.store import list_checkpoints, open_checkpoint
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.files import write_atomic
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir


def run_dir_of(recipe: Recipe, given: Path | None) -> RunDir:
    """The run directory: the given one, or `runs/<name>`."""
    return RunDir(given or Path("runs") / recipe.name)


def absolute_resume(resume: str) -> str:
    """What to resume from, independent of the working directory."""
    return resume if resume in ("auto", "none") else str(Path(resume).absolute())


def check_resume(checked: Checked, run_dir: RunDir, resume: str) -> None:
    """Refuse to go on where the run directory and the recipe do not belong together.

    Topology, steps, schedule, logging and so on may change between launches of one run; the model may not.

    Args:
        resume: auto, none, or a checkpoint's path.

    Raises:
        RecipeError: the model differs from that of the checkpoints; `none` would mix two runs in one directory;
            no such checkpoint; a checkpoint that is named, to go on from or for the initial weights, is damaged or
            would run code.
    """
    elsewhere = "train in a new directory: --run-dir DIR"
    saved = list_checkpoints(run_dir.checkpoints)
    if resume == "none" and (saved or run_dir.read_metrics()):
        raise RecipeError(
            Problem(f"{run_dir.root} holds a run already", why="--resume none starts a new one", fix=elsewhere)
        )
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise RecipeError(Problem(f"there is no checkpoint {resume}", fix="--resume auto takes the newest of the run"))
    initial = checked.recipe.checkpoint.initial
    _check_named({"--resume": None if resume in ("auto", "none") else resume, "checkpoint.initial": initial})
    if saved and run_dir.recipe.exists():
        stored = load_recipe(run_dir.recipe).recipe.model
        changed = model_differences(stored.model_dump(mode="json"), checked.recipe.model)
        why = f"the checkpoints in {run_dir.root} are of another model"
        if changed:
            raise RecipeError(
                *(Problem(f"is {new}, was {old}", why, f"{old}, or {elsewhere}", key=key) for key, old, new in changed)
            )


def _check_named(named: Mapping[str, str | None]) -> None:
    for key, path in named.items():
        try:
            if path is not None:
                open_checkpoint(Path(path), key=key)
        except TplaunchError as error:
            raise RecipeError(*error.problems) from None


def prepare_data(checked: Checked) -> Checked:
    """The recipe with its data made ready: raw text is prepared on first use, and everything is checked.

    Raises:
        RecipeError: holds every problem of the data.
    """
    from tplaunch.data.prepare import prepare_recipe_data

    return checked._replace(recipe=prepare_recipe_data(checked.recipe))


def write_recipe(checked: Checked, run_dir: RunDir) -> None:
    """Write the resolved recipe into the run directory, for the workers. The caller holds the directory."""
    write_atomic(run_dir.recipe, dump_recipe(checked.recipe))
