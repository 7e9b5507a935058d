"""Steps between checking a recipe and launching it: run directory, resume check, data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tplaunch.check.recipe import Checked
from tplaunch.check.samples import check_prompts
from tplaunch.check.tasks import check_choices
from tplaunch.checkpoint.fit import adapter_differences, model_differences
from tplaunch.checkpoint.store import list_checkpoints, open_checkpoint
from tplaunch.data.beside import TEMPLATE, TOKENIZER, copy_text
from tplaunch.data.chat import read_file
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.files import write_atomic
from tplaunch.huggingface.base import refuse_changed
from tplaunch.launch.branch import Branch, branch_of, check_branch
from tplaunch.launch.initial import check_initial, with_initial
from tplaunch.launch.resume import (
    Before,
    Changes,
    before_this,
    data_changes,
    past,
    recipe_changes,
    refuse,
    refuse_other_past,
    settled_units,
    stage_changes,
)
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Changed
from tplaunch.spec.run_stages import longest_samples


def run_dir_of(recipe: Recipe, given: Path | None) -> RunDir:
    """The run directory: the given one, or `runs/<name>`."""
    return RunDir(given or Path("runs") / recipe.name)


def absolute_resume(resume: str) -> str:
    """What to resume from, independent of the working directory."""
    return resume if resume in ("auto", "none") else str(Path(resume).absolute())


def check_resume(checked: Checked, run_dir: RunDir, resume: str, parent: str | None = None) -> Branch | None:
    """Refuse to go on where the run directory and the recipe do not belong together.

    Topology, steps, schedule, logging and so on may change between launches of one run; the model may not.

    Args:
        resume: auto, none, or a checkpoint's path.
        parent: `RUN@STEP` that it is to branch from (`launch.branch`).

    Returns:
        Where the run branches, or has branched, from another.

    Raises:
        RecipeError: the model differs from that of the checkpoints; `none` would mix two runs in one directory;
            no such checkpoint; a checkpoint that is named, to go on from or for the initial weights, is damaged or
            would run code; or see `branch_of` and `check_branch`.
    """
    branch = branch_of(parent, run_dir, resume)
    elsewhere = "train in a new directory: --run-dir DIR"
    saved = list_checkpoints(run_dir.checkpoints)
    if resume == "none" and (saved or branch is not None or run_dir.read_metrics()):
        raise RecipeError(
            Problem(f"{run_dir.root} holds a run already", why="--resume none starts a new one", fix=elsewhere)
        )
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise RecipeError(Problem(f"there is no checkpoint {resume}", fix="--resume auto takes the newest of the run"))
    if resume not in ("auto", "none"):
        _check_named(Path(resume))
    elif not saved:  # else they have been taken
        if branch is not None:
            check_branch(checked, branch)
        check_initial(checked)
    if saved and run_dir.recipe.exists():
        stored = load_recipe(run_dir.recipe).recipe
        changed = model_differences(stored.model.model_dump(mode="json"), checked.recipe.model)
        lora = None if stored.lora is None else stored.lora.model_dump(mode="json")
        changed += adapter_differences(lora, checked.recipe.lora)
        why = f"the checkpoints in {run_dir.root} are of another model"
        if changed:
            raise RecipeError(
                *(Problem(f"is {new}, was {old}", why, f"{old}, or {elsewhere}", key=key) for key, old, new in changed)
            )
    return branch


def _check_named(checkpoint: Path) -> None:
    try:
        open_checkpoint(checkpoint, key="--resume")
    except TplaunchError as error:
        raise RecipeError(*error.problems) from None


@dataclass(frozen=True)
class Ready:
    """A launch whose data are ready.

    Args:
        checked: the recipe, its data token files.
        facts: of its data (`data_facts`).
        tokenizer: the file that the run keeps a copy of.
        changes: what differs from the launch before, told by dotted key.
        allowed: the changes that the user has allowed.
        notes: what else there is to say of it.
        branch: where it goes on from another run; None: it does not, or has checkpoints of its own.
    """

    checked: Checked
    facts: dict[str, Any]
    tokenizer: Path | None
    changes: Changes
    allowed: Sequence[str]
    notes: Sequence[str] = ()
    branch: Branch | None = None


def make_ready(
    checked: Checked, run_dir: RunDir, *, resume: str = "auto", allow: Sequence[str] = (), parent: str | None = None
) -> Ready:
    """Check that the launch goes on with the run that is there, and make its data ready: raw text is prepared on
    first use. A run that goes on keeps the tokenizer that its weights were trained with. Writes nothing into the run
    directory.

    Args:
        resume: auto, none, or a checkpoint's path.
        allow: keys whose change is allowed (--allow-change).
        parent: `RUN@STEP` that it is to branch from.

    Raises:
        RecipeError: see `check_resume`; or holds every problem of the data, every change that is not allowed, or
            every prompt that is too long.
    """
    from tplaunch.data.fingerprint import data_facts
    from tplaunch.data.prepare import prepare_recipe_data

    branch = check_resume(checked, run_dir, resume, parent)
    before = before_this(run_dir, resume, branch)
    changes: Changes = {}
    recipe = with_initial(checked.recipe, run_dir)
    if before is not None and recipe.checkpoint.initial is not None and "base" in before.about:
        was = before.about["base"]["fingerprint"]
        refuse_changed(Path(recipe.checkpoint.initial), was, f"{before.path} holds adapters alone")
    if before is not None:
        changes = recipe_changes(before, recipe)
        refuse(changes, before, allow)
        refuse_other_past(before, recipe, allow)
        recipe = _keep_tokenizer(recipe, before, allow)
    recipe = prepare_recipe_data(recipe)
    facts = data_facts(recipe)
    units: dict[str, int] = {}
    if before is not None and (known := before.facts()) is not None:
        found = data_changes(known, facts)
        if any(one is not None and one.training.stages for one in (before.recipe, recipe)):
            units = settled_units(before, known, facts)
            found.pop("data.train", None)
            found |= stage_changes(before, known, recipe, facts | {"units": units})
        changes |= found
        refuse(changes, before, allow)
        if not recipe.training.stages:
            facts |= past(before, known, recipe, changes)
    lengths = longest_samples(recipe)
    facts["units"] = lengths | units
    notes = [
        f"warning: samples of {lengths[path]} tokens of {path} join pieces of {unit}: the run has read it by these"
        for path, unit in units.items()
        if lengths[path] > unit
    ]
    named = recipe.data.tokenizer
    tokenizer = Path(named) if isinstance(named, str) else None
    check_prompts(recipe, tokenizer)
    check_choices(recipe, tokenizer)
    if tokenizer is not None:
        data = recipe.data.model_copy(update={"tokenizer": str(run_dir.tokenizer.absolute())})
        recipe = recipe.model_copy(update={"data": data})
    branch = None if before is None or before.parent is None else branch
    return Ready(checked._replace(recipe=recipe), facts, tokenizer, changes, allow, notes, branch)


def _keep_tokenizer(recipe: Recipe, before: Before, allow: Sequence[str]) -> Recipe:
    """The recipe with the run's own tokenizer instead of one that would be trained again."""
    kept, wanted = before.tokenizer, recipe.data.tokenizer
    if kept is None or isinstance(wanted, str) or (wanted is not None and "data.tokenizer" in allow):
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(kept)})})


def write_ready(ready: Ready, run_dir: RunDir) -> None:
    """Write what the workers read into the run directory, and note what changed. The caller holds the directory."""
    from tplaunch.data.tokenizer import Tokenizer

    if ready.tokenizer is not None and ready.tokenizer != run_dir.tokenizer.absolute():
        if ready.tokenizer.name == TOKENIZER:
            copy_text(ready.tokenizer.parent, run_dir.root)  # what its folder says about text, for export and generate
        # With the end of documents marked in it: checkpoints keep this file alone.
        write_atomic(run_dir.tokenizer, Tokenizer(ready.tokenizer, ready.checked.recipe.data.eod).json)
    if (template := ready.checked.recipe.finetune.chat_template) is not None:
        write_atomic(run_dir.tokenizer.with_name(TEMPLATE), read_file(Path(template)))
    write_atomic(run_dir.data_facts, json.dumps(ready.facts))
    write_recipe(ready.checked, run_dir)
    if (branch := ready.branch) is not None and branch != branch_of(None, run_dir):
        run_dir.append(branch.event)
    if ready.changes:
        run_dir.append(Changed({key: list(pair) for key, pair in ready.changes.items()}, list(ready.allowed)))


def write_recipe(checked: Checked, run_dir: RunDir) -> None:
    """Write the resolved recipe into a directory, for the ranks."""
    write_atomic(run_dir.recipe, dump_recipe(checked.recipe))
