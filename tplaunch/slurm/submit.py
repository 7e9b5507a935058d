"""From a recipe to jobs in the queue: one run, a sweep as one array, or a chain of jobs that go on from each other."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.launch.prepare import Ready, check_resume, make_ready, write_ready
from tplaunch.plan.recomputation import settle
from tplaunch.recipe.load import LoadedRecipe, load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Submitted
from tplaunch.slurm import client
from tplaunch.slurm.cluster import cluster_problems, read_cluster
from tplaunch.slurm.script import data_folders, write_script
from tplaunch.spec.gpu import find_gpu

# What a sweep cannot vary: the tasks of an array share one script and one shape of allocation.
_SHARED = ("name", "launch", "topology.nodes", "topology.gpus_per_node")


@dataclass(frozen=True)
class Member:
    """One run of a submission.

    Args:
        parent: `RUN@STEP` that it branches from, where it does.
    """

    checked: Checked
    run_dir: RunDir
    parent: str | None = None


@dataclass(frozen=True)
class Submission:
    """What is to be submitted.

    Args:
        name: of the recipe.
        root: the run directory; of a sweep, the folder that holds its run directories.
        members: one, or those of the sweep in the order of the array.
        loaded: the recipe before it was swept; it knows where each value was said.
        parents: the folders of what they branch from, where they do.
    """

    name: str
    root: Path
    members: list[Member]
    loaded: LoadedRecipe
    parents: Sequence[Path] = ()

    @property
    def log_dir(self) -> Path:
        return self.root / "slurm"

    def script(self) -> str:
        """The batch script.

        Raises:
            RecipeError: see `write_script`.
        """
        first = self.members[0].checked
        try:
            return write_script(
                first.recipe.model_copy(update={"name": self.name}),
                first.topology,
                [member.run_dir.root for member in self.members],
                log_dir=self.log_dir,
                folders=[
                    *(folder for member in self.members for folder in data_folders(member.checked.recipe)),
                    *self.parents,
                ],
            )
        except RecipeError as error:
            raise RecipeError(*(replace(p, where=self.loaded.where(p.key)) for p in error.problems)) from None


def plan_submission(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    sweep: Sequence[str] = (),
    run_dir: Path | None = None,
    chain: bool = False,
    need_data: bool = True,
    parent: str | None = None,
) -> Submission:
    """Check everything that can be checked before data are prepared; change nothing.

    Args:
        recipe: the file.
        overrides: `KEY=VALUE`, as for `--set`.
        sweep: `KEY=VALUE,VALUE,...`; several make their product.
        run_dir: default runs/NAME.
        chain: the jobs of a chain take the place of requeues.
        need_data: refuse missing data files.
        parent: `RUN@STEP` that each of the runs branches from.

    Raises:
        RecipeError, TplaunchError: every problem of the recipe; of a sweep, those of its first wrong member.
    """
    overrides = [*overrides, *(["launch.slurm.requeue=false"] if chain else [])]
    loaded = load_recipe(recipe, overrides)
    parallelism, name = loaded.recipe.topology, loaded.recipe.name
    if parallelism.dp == "auto" and parallelism.gpus_per_node is None:
        why = "the nodes that the job will get cannot be counted here"
        fix = "topology.gpus_per_node: 8, say, or dp as a number"
        where = loaded.where("topology.dp") or str(loaded.path)
        raise RecipeError(Problem("auto cannot fill nodes of unknown size", why, fix, where, "topology.dp"))
    root = (run_dir or Path("runs") / name).absolute()
    if not sweep:
        member = Member(_checked(loaded, need_data=need_data), RunDir(root), parent)
        return Submission(name, root, [member], loaded, _parents([member]))
    if RunDir(root).recipe.exists():
        raise TplaunchError(Problem(f"{root} is a single run", fix="another place for the sweep: --run-dir DIR"))
    group = loaded.recipe.logging.wandb.group or name
    said = "job_type" in loaded.recipe.logging.wandb.model_fields_set
    job_type = [] if said else ["logging.wandb.job_type=sweep"]
    members = []
    for number, settings in enumerate(_settings(sweep)):
        label = "-".join([str(number), *(f"{key.split('.')[-1]}-{value}" for key, value in settings)])
        label = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:64]
        more = [f"{key}={value}" for key, value in settings]
        more += [f"name={name[:60]}-{label}", f"logging.wandb.group={group}", *job_type]
        checked = _checked(load_recipe(recipe, [*overrides, *more]), need_data=need_data)
        members.append(Member(checked, RunDir(root / label), parent))
    shapes = {(m.checked.topology.nodes, m.checked.topology.ranks_per_node) for m in members}
    if len(shapes) > 1:
        text = " and ".join(f"{nodes} nodes of {ranks}" for nodes, ranks in sorted(shapes))
        why = "the tasks of one array all get the same nodes"
        fix = "topology.dp=auto with nodes and gpus_per_node given, or one sweep for each shape"
        raise TplaunchError(Problem(f"the members of the sweep need {text}", why=why, fix=fix))
    return Submission(name, root, members, loaded, _parents(members))


def _parents(members: Sequence[Member]) -> list[Path]:
    """The folders of the runs that they branch, or have branched, from.

    Raises:
        RecipeError: one cannot (`launch.branch`).
    """
    branches = [
        check_resume(member.checked, member.run_dir, "auto", member.parent)
        for member in members
        if member.parent is not None or member.run_dir.history().parent is not None
    ]
    return list(dict.fromkeys(branch.run.root for branch in branches if branch is not None))


def _checked(loaded: LoadedRecipe, *, need_data: bool) -> Checked:
    """A recipe that can run; recomputation is decided for the GPU that it names, not for one of this machine."""
    checked = check_recipe(loaded, need_data=need_data)
    gpu, key = checked.recipe.hardware.gpu, "training.recompute"
    if checked.recipe.training.recompute == "auto" and gpu is None:
        why = "auto goes by the memory of the GPUs that the job will get, and they are not named"
        raise RecipeError(Problem("is auto", why, "hardware.gpu: h100-80gb, say", loaded.where(key) or "", key))
    return settle(checked, find_gpu(gpu) if gpu else None)


def _settings(sweep: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Each member's (key, value)s: the product of the axes, the last one fastest."""
    axes, problems = [], []
    for text in sweep:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            problems.append(Problem(f"{text!r} is not KEY=VALUE,VALUE", fix="such as --sweep optimizer.lr=1e-4,3e-4"))
        elif any(key == shared or key.startswith(f"{shared}.") for shared in _SHARED):
            problems.append(Problem("cannot be swept", why="all tasks of an array share it", where="--sweep", key=key))
        axes.append([(key, value) for value in split_values(values)])
    if problems:
        raise TplaunchError(*problems)
    for settings in product(*axes):
        yield list(settings)


def split_values(text: str) -> list[str]:
    """Split at commas, but not within brackets: "[0.9,0.95],[0.9,0.99]" has two values."""
    values, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append(text[start:at])
            start = at + 1
    return [*values, text[start:]]


def send(
    submission: Submission,
    *,
    chain: int = 1,
    allow: Sequence[str] = (),
    tell: Callable[[Ready], None] = lambda ready: None,
) -> list[str]:
    """Prepare the data and the run directories, write the script, and submit it.

    Args:
        chain: how many jobs, each waiting for the end of the one before.
        allow: keys whose change is allowed (--allow-change).
        tell: told of each run whose data are ready.

    Returns:
        The jobs' numbers, in order.

    Raises:
        TplaunchError: what the cluster cannot give, data that cannot be prepared, a run that is in the queue already,
            or what sbatch refuses.
    """
    script = submission.script()
    client.version()  # data take long to prepare: where there is no Slurm, or not what is asked of it, say so first
    first = submission.members[0].checked
    problems = cluster_problems(first.recipe, first.topology, read_cluster())
    if problems:
        raise RecipeError(*(replace(problem, where=submission.loaded.where(problem.key)) for problem in problems))
    for member in submission.members:
        check_resume(member.checked, member.run_dir, "auto", member.parent)
        job = open_job(member.run_dir)
        if job is not None:
            what = f"job {job.id} of {member.run_dir.root} is {job.state.lower()} already"
            raise TplaunchError(Problem(what, fix=f"wait for it, or: tplaunch cancel {shlex.quote(job.id)}"))
    for member in submission.members:
        tell(prepare_run(member, allow))
    submission.log_dir.mkdir(parents=True, exist_ok=True)
    path = submission.log_dir / "job.sbatch"
    path.write_text(script)
    jobs: list[str] = []
    try:
        for _ in range(chain):
            jobs.append(client.submit(path, after=jobs[-1] if jobs else None))
    finally:  # what is in the queue is recorded, also where Slurm has refused a later job of the chain
        if jobs:
            _record(submission, jobs)
    return jobs


def _record(submission: Submission, jobs: list[str]) -> None:
    """Write the jobs of a submission into the run directories."""
    for task, member in enumerate(submission.members):
        own = [f"{job}_{task}" for job in jobs] if len(submission.members) > 1 else list(jobs)
        member.run_dir.append(Submitted(own, [str(submission.log_dir / f"{job}.log") for job in own]))


def prepare_run(member: Member, allow: Sequence[str] = ()) -> Ready:
    """Make the data and the run directory ready and write the recipe there, resolved: what the ranks read.

    Raises:
        RecipeError: see `make_ready`.
    """
    run_dir = member.run_dir
    ready = make_ready(member.checked, run_dir, allow=allow, parent=member.parent)
    run_dir.create()
    run_dir.slurm.mkdir(exist_ok=True)
    with run_dir.lock():
        write_ready(ready, run_dir)
    return ready


def open_job(run_dir: RunDir) -> client.Standing | None:
    """The first job of a run that waits or runs."""
    jobs = client.find_jobs(run_dir.history().submitted_jobs).values()
    return next((job for job in jobs if job.open), None)
