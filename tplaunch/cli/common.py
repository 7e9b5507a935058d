"""What several commands do: load and check a recipe, choose the GPU to plan for, print JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tplaunch.errors import Problem, RecipeError, TplaunchError

if TYPE_CHECKING:
    from tplaunch.check.recipe import Checked
    from tplaunch.launch.prepare import Ready
    from tplaunch.plan.case import Case
    from tplaunch.recipe.load import LoadedRecipe
    from tplaunch.recipe.schema import Recipe
    from tplaunch.spec.gpu import Gpu

_STAND_IN = "h100-80gb"


def checked_here(recipe: str, set_: list[str] | None, *, need_data: bool, warn: bool = True) -> Checked:
    """A recipe, checked against the GPUs of as many machines like this as it has nodes; warnings are printed."""
    from tplaunch.check.recipe import check_recipe
    from tplaunch.check.world import shared_gpus
    from tplaunch.machine import count_gpus, shares_gpus
    from tplaunch.recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    gpus = count_gpus() * loaded.recipe.topology.nodes
    if warn and loaded.recipe.topology.async_tp and not gpus:
        typer.echo("warning: topology.async_tp is off: its fused matmuls are for CUDA GPUs, and none is here", err=True)
    checked = check_recipe(loaded, gpus=None if shares_gpus() else gpus or None, need_data=need_data)
    if checked.recipe.training.recompute == "auto":
        from tplaunch.plan.recomputation import settle

        checked = settle(checked, _gpu_of(checked.recipe))
    refuse_export(checked.recipe, loaded)
    if problems := shared_gpus(checked.recipe, gpus):
        raise RecipeError(*(replace(problem, where=loaded.where(problem.key)) for problem in problems))
    for warning in checked.warnings if warn else ():
        typer.echo(f"warning: {warning}", err=True)
    return checked


def refuse_export(recipe: Recipe, loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose run could not make the Hugging Face folders that it asks for.

    Raises:
        RecipeError: see `tplaunch.huggingface.families.family_of`.
    """
    key = "checkpoint.export_every"
    if recipe.checkpoint.export_every:
        from tplaunch.huggingface.families import family_of

        try:
            family_of(recipe.model)
        except TplaunchError as error:
            raise RecipeError(*(replace(p, key=key, where=loaded.where(key)) for p in error.problems)) from None


class Told:
    """Says of launches what differs from the one before, and what they read; of several, what was said once only once
    (the members of a sweep read the same)."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, ready: Ready) -> None:
        from tplaunch.launch.resume import told

        branch = [f"branch: goes on from {ready.branch}, {ready.branch.checkpoint}"] if ready.branch else []
        changes = [f"changed: {one}" for one in told(ready.changes)]
        for line in (*branch, *changes, *data_lines(ready.checked.recipe), *ready.notes):
            if line not in self._said:
                typer.echo(line, err=True)
                self._said.add(line)


def data_lines(recipe: Recipe) -> list[str]:
    """What the run reads of each corpus of the training data, and warnings of those that it reads too often."""
    from tplaunch.data.amounts import amounts, in_words, unlearned, worn_out

    found = amounts(recipe)
    problems = [*worn_out(found), *unlearned(found)]
    warnings = [typer.style(f"warning: {problem}", fg="yellow") for problem in problems]
    return [*(f"data: {line}" for line in in_words(found)), *warnings]


def planned(recipe: str, set_: list[str] | None, gpu: str | None) -> tuple[LoadedRecipe, Checked, Case]:
    """A recipe on the GPU that it, or --gpu, names; else on this machine's; else on a usual one, which is said."""
    from tplaunch.check.recipe import check_recipe
    from tplaunch.plan.case import Case
    from tplaunch.recipe.load import load_recipe
    from tplaunch.spec.gpu import find_gpu

    overrides = [*(set_ or ()), *([f"hardware.gpu={gpu}"] if gpu else [])]
    loaded = load_recipe(recipe, overrides)
    checked = check_recipe(loaded, need_data=False)
    hardware = _gpu_of(checked.recipe)
    if hardware is None:
        hardware = find_gpu(_STAND_IN)
        typer.echo(f"no GPU is named or here: planned for {_STAND_IN}, --gpu plans for another", err=True)
    if checked.recipe.training.recompute == "auto":
        from tplaunch.plan.recomputation import settle

        checked = settle(checked, hardware)
    return loaded, checked, Case(checked.recipe, hardware)


def _gpu_of(recipe: Recipe) -> Gpu | None:
    """The GPU that a recipe names, else this machine's; None where the table has neither."""
    from tplaunch.spec.gpu import find_gpu, local_gpu

    name = recipe.hardware.gpu
    return find_gpu(name) if name else local_gpu()


def check_rank(rank: int | None, case: Case) -> None:
    """Refuse a --rank that the world does not have."""
    if rank is not None and not 0 <= rank < case.topology.world_size:
        raise TplaunchError(
            Problem(f"there is no rank {rank}", fix=f"0 to {case.topology.world_size - 1}", key="--rank")
        )


def echo_json(value: Any) -> None:
    """Print one JSON value."""
    import json  # not at the top: most answers are text

    typer.echo(json.dumps(value, indent=2))


def write_text(path: Path, text: str, option: str) -> None:
    """Write the file that an option names.

    Raises:
        TplaunchError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TplaunchError(Problem(f"cannot write {path}", why=str(error), key=option)) from error
