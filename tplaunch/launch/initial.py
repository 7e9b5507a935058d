"""What a new run takes its weights from (`checkpoint.initial`), looked at before any process starts: a checkpoint, also
as `RUN@STEP`, a run directory, which means its newest, or a Hugging Face folder. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.fit import model_differences, refuse_adapters
from tplaunch.checkpoint.store import checkpoint_step, damage, find_checkpoints, is_checkpoint, open_checkpoint
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.huggingface.config import CONFIG, Read, is_model_folder
from tplaunch.huggingface.source import UNTIED, open_folder
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.named import read_name

_KEY = "checkpoint.initial"


def initial_of(path: Path) -> Path:
    """The checkpoint that a path means, of several the newest that is complete; or the Hugging Face folder.

    Raises:
        TplaunchError: there is none.
    """
    if is_model_folder(path) and not is_checkpoint(path):
        return path
    return newest_whole(path)


def newest_whole(text: str | Path) -> Path:
    """The checkpoint that is meant (`find_checkpoints`): of several the newest that is complete, else the newest.

    Raises:
        TplaunchError: there is none.
    """
    newest_first = find_checkpoints(text)[::-1]
    return next((one for one in newest_first if _is_complete(one)), newest_first[0])


def _is_complete(checkpoint: Path) -> bool:
    try:
        return not damage(checkpoint, open_checkpoint(checkpoint), read_files=False)
    except TplaunchError:
        return False


def check_initial(checked: Checked) -> None:
    """Refuse weights that cannot be loaded, or are not of the recipe's model.

    Raises:
        RecipeError: the path means nothing; a checkpoint is damaged or would run code; a folder's tensors are not those
            of its `config.json`, or are pickled; or the model differs: each field that does, with its place.
    """
    recipe = checked.recipe
    if recipe.checkpoint.initial is None:
        return
    try:
        initial = initial_of(Path(recipe.checkpoint.initial))
        if is_checkpoint(initial):
            about = open_checkpoint(initial, key=_KEY).about
            if found := refuse_adapters(initial, about):
                raise RecipeError(*found)
            _refuse_other(checked, about["model"], initial, "its weights are of another model")
        else:
            _check_folder(checked, initial)
    except RecipeError:
        raise
    except TplaunchError as error:
        where = checked.where(_KEY)
        raise RecipeError(*(replace(one, where=where, key=_KEY) for one in error.problems)) from None


def _check_folder(checked: Checked, folder: Path) -> None:
    model = checked.recipe.model

    def check(read: Read, warnings: list[str]) -> None:
        untied = UNTIED in warnings and model.tie_embeddings
        turns = all(read.model.turns(layer) == model.turns(layer) for layer in range(model.num_layers))
        same = {"rope_layers": model.rope_layers} if turns else {}  # a pattern may be said shorter
        why = UNTIED if untied else "its weights are of another model"
        _refuse_other(checked, read.model.model_copy(update=same).model_dump(mode="json"), folder / CONFIG, why)

    open_folder(folder, vocab_multiple=model.make_vocab_size_divisible_by, check=check)


def _refuse_other(checked: Checked, stored: Mapping[str, Any], path: Path, why: str) -> None:
    """Refuse weights of another model, field by field.

    Args:
        stored: the model, as plain data.
        path: what says so.
    """
    found = model_differences(stored, checked.recipe.model, weights_only=True)
    if found:
        raise RecipeError(
            *(
                Problem(
                    f"is {json.dumps(ours)}, and {path} has {json.dumps(theirs)}",
                    why=why,
                    fix=f"{key.rpartition('.')[2]}: {json.dumps(theirs)}, or other weights",
                    where=checked.where(key),
                    key=key,
                )
                for key, theirs, ours in found
            )
        )


def with_initial(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """The recipe with the checkpoint that its `checkpoint.initial` means: of a run directory the newest, once for all
    launches of the run that takes its weights.

    Raises:
        TplaunchError: see `initial_of`.
    """
    given = recipe.checkpoint.initial
    if given is None:
        return recipe
    known = load_recipe(run_dir.recipe).recipe.checkpoint.initial if run_dir.recipe.exists() else None
    named = known if known is not None and _means(given, Path(known)) else str(initial_of(Path(given)))
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"initial": named})})


def _means(given: str, known: Path) -> bool:
    """Whether a text means a checkpoint that was found by it before, which need not be the newest any more."""
    path, step = read_name(given)
    return known.is_relative_to(path) and step in (None, checkpoint_step(known))
