"""A branch: a new run that goes on from a step of another (`--from RUN@STEP`), with its weights, its optimizer and its
place in the data. Looked at before any process starts. Torch-free.

The run directory remembers the parent by an event (`Branched`): whatever starts the ranks again finds it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.fit import adapter_differences, missing_state, model_differences
from tplaunch.checkpoint.store import damage, is_checkpoint, list_checkpoints, open_checkpoint
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.launch.initial import newest_whole
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Branched
from tplaunch.run.named import RUNS, read_name

OPTION = "--from"


@dataclass(frozen=True)
class Branch:
    """Where a run branches from another.

    Args:
        run: the parent; of a checkpoint that lies in no run, that.
        step: of it.
        checkpoint: of that step.
    """

    run: RunDir
    step: int
    checkpoint: Path

    def __str__(self) -> str:
        return f"{self.run.root.name}@{self.step}"

    @property
    def event(self) -> Branched:
        """What the run directory remembers."""
        return Branched(self.step, str(self.run.root), str(self.checkpoint))


def branch_of(asked: str | None, run_dir: RunDir, resume: str = "auto") -> Branch | None:
    """Where a run branches from another: as it has begun, else as is asked for. None: it begins by itself.

    Args:
        asked: `RUN@STEP`, `RUN` for its newest whole checkpoint, or a checkpoint's path.
        run_dir: of the branch.
        resume: auto, none, or a checkpoint's path.

    Raises:
        RecipeError: the run directory holds another run, or there is no such checkpoint, or none that is whole.
    """
    known = run_dir.history().parent
    old = None if known is None else Branch(RunDir(Path(known.parent)), known.step, Path(known.path))
    if asked is None:
        return old
    if resume != "auto":
        why = "both say what the run goes on from"
        raise RecipeError(Problem(f"does not go with --resume {resume}", why, "leave one of them out", key=OPTION))
    begun = bool(list_checkpoints(run_dir.checkpoints)) or bool(run_dir.read_metrics())
    if old is not None and _means(asked, old) and (begun or old.checkpoint.is_dir()):
        return old
    if begun:
        why = f"it branched from {old}" if old is not None else ""
        fix = "a new name for the branch (--set name=NAME, or --run-dir DIR); without --from, that run goes on"
        raise RecipeError(Problem(f"{run_dir.root} holds another run already", why, fix, key=OPTION))
    try:
        checkpoint = newest_whole(asked).absolute()
        manifest = open_checkpoint(checkpoint)
    except TplaunchError as error:
        raise RecipeError(*(_of_option(problem) for problem in error.problems)) from None
    run = RunDir(checkpoint.parent.parent)
    return Branch(run if run.recipe.exists() else RunDir(checkpoint), manifest.step, checkpoint)


def _of_option(problem: Problem) -> Problem:
    fix = problem.fix or f"name another step of the run: {OPTION} RUN@STEP (`tplaunch checkpoint list RUN`)"
    return Problem(problem.what, problem.why, fix, problem.where, OPTION)


def _means(asked: str, branch: Branch) -> bool:
    """Whether this is where a branch began; the parent need not be there any more."""
    path, step = read_name(asked)
    if step is None and (is_checkpoint(path) or path.absolute() == branch.checkpoint):
        return path.absolute() == branch.checkpoint
    return step in (None, branch.step) and branch.run.root in (path.absolute(), (RUNS / path).absolute())


def check_branch(checked: Checked, branch: Branch) -> None:
    """Refuse a branch that cannot go on from its parent's checkpoint.

    Raises:
        RecipeError: the checkpoint is not there any more or is damaged; it is of another model, adapters or optimizer;
            the recipe names other weights, too; or it ends where the branch begins.
    """
    recipe, checkpoint = checked.recipe, branch.checkpoint
    try:
        manifest = open_checkpoint(checkpoint)
    except TplaunchError as error:
        raise RecipeError(*(_of_option(problem) for problem in error.problems)) from None
    if torn := damage(checkpoint, manifest, read_files=False):
        raise RecipeError(*(_of_option(Problem(text)) for text in torn))
    about, staged = manifest.about, bool(recipe.training.stages)
    problems = []
    if recipe.checkpoint.initial is not None and recipe.lora is None:
        fix = "--set checkpoint.initial=null, or leave out --from: a run of its own that takes weights alone"
        why = f"the weights are those of {branch}: a run takes them from one place"
        problems.append(Problem("is said beside --from", why, fix, key="checkpoint.initial"))
    if recipe.lora is None and about.get("lora") is not None:
        fix = "make a whole model of it (`tplaunch export --merge`), and name that folder as checkpoint.initial"
        problems.append(
            Problem(f"{checkpoint} holds adapters alone", "the recipe trains the whole model", fix, "", OPTION)
        )
    else:
        found = model_differences(about["model"], recipe.model, moves=("rope_theta",) if staged else ())
        found += adapter_differences(about.get("lora"), recipe.lora)
        why = f"{branch} is of another model"
        problems += [Problem(f"is {ours}, was {theirs}", why, f"{theirs}", key=key) for key, theirs, ours in found]
    if missing := missing_state(about, recipe.optimizer):
        fix = "the optimizer of the parent; or checkpoint.initial, which takes weights alone"
        problems.append(
            Problem(f"{checkpoint} has no {', '.join(missing)} to go on with", "", fix, key="optimizer.name")
        )
    if recipe.training.steps <= manifest.step:
        fix = f"more than {manifest.step} in all, such as --set training.steps={2 * manifest.step}"
        what = f"the run ends with step {recipe.training.steps}"
        problems.append(Problem(what, f"the branch begins after step {manifest.step}", fix, key="training.steps"))
    if problems:
        raise RecipeError(*(Problem(p.what, p.why, p.fix, p.where or checked.where(p.key), p.key) for p in problems))
