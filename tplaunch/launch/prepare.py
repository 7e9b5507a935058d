"""What stands between a checked recipe and its launch: the run directory, what is in it already, and the data."""

from __future__ import annotations

from pathlib import Path

from tplaunch.check import Checked
from tplaunch.errors import Problem, RecipeError
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.recipe.schema import Model, Recipe
from tplaunch.rundir import RunDir


def run_dir_of(recipe: Recipe, given: Path | None) -> RunDir:
    """The run directory: the given one, or `runs/<name>`."""
    return RunDir(given or Path("runs") / recipe.name)


def steps_done(run_dir: RunDir) -> int:
    """The step at which the run was done last; 0: never."""
    return max((event["step"] for event in run_dir.read_events() if event["event"] == "done"), default=0)


def check_resume(checked: Checked, run_dir: RunDir, resume: str) -> None:
    """Refuses to go on where the run directory and the recipe do not belong together.

    Topology, steps, schedule, logging and so on may change between launches of one run; the model may not.

    Args:
        resume: auto, none, or a checkpoint's path.

    Raises:
        RecipeError: the model differs from that of the checkpoints; `none` would mix two runs in one directory;
            no such checkpoint.
    """
    from tplaunch.checkpoint.store import list_checkpoints

    elsewhere = "train in a new directory: --run-dir DIR"
    saved = list_checkpoints(run_dir.checkpoints)
    if resume == "none" and (saved or run_dir.read_metrics()):
        raise RecipeError(
            Problem(f"{run_dir.root} holds a run already", why="--resume none starts a new one", fix=elsewhere)
        )
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise RecipeError(Problem(f"there is no checkpoint {resume}", fix="--resume auto takes the newest of the run"))
    if saved and run_dir.recipe.exists():
        stored = load_recipe(run_dir.recipe).recipe.model
        changed = _differences(stored, checked.recipe.model)
        why = f"the checkpoints in {run_dir.root} are of another model"
        if changed:
            raise RecipeError(
                *(Problem(f"is {new}, was {old}", why, f"{old}, or {elsewhere}", key=key) for key, old, new in changed)
            )


def _differences(stored: Model, asked: Model) -> list[tuple[str, object, object]]:
    """(key, stored value, asked value) of the fields that differ; a preset is only a name for values."""
    old, new = stored.model_dump(exclude={"preset"}), asked.model_dump(exclude={"preset"})
    return [(f"model.{key}", old[key], new[key]) for key in old if old[key] != new[key]]


def prepare_data(checked: Checked) -> Checked:
    """The recipe with its data made ready: raw text is prepared on first use, and everything is checked.

    Raises:
        RecipeError: holds every problem of the data.
    """
    from tplaunch.data.prepare import prepare_recipe_data

    return checked._replace(recipe=prepare_recipe_data(checked.recipe))


def write_recipe(checked: Checked, run_dir: RunDir) -> None:
    """Writes the resolved recipe into the run directory, for the workers. The caller holds the directory."""
    temporary = run_dir.recipe.with_suffix(".tmp")
    temporary.write_text(dump_recipe(checked.recipe))
    temporary.replace(run_dir.recipe)
