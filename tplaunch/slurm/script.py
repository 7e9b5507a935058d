"""A recipe as one readable sbatch script: what an engineer would write by hand, each line with its reason.

Strings of a recipe reach the script in two ways only: as the value of an #SBATCH option, which must then be a plain
Slurm name, or quoted, as the value of a shell variable. (`launch.slurm.setup` is shell by its meaning.) What runs is
the same text for every recipe and refers to those variables. Secrets are refused: sbatch passes the environment on,
so an exported WANDB_API_KEY reaches the workers without being written anywhere.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tplaunch.errors import Problem, RecipeError
from tplaunch.launch.torchrun import WORKER
from tplaunch.recipe.schema import Recipe
from tplaunch.slurm.options import option_problems, sbatch_options
from tplaunch.spec.run_stages import segments
from tplaunch.spec.topology import Topology

_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+:@=-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = re.compile(r"SLURM_.*|TPLAUNCH_.*|RUN_DIRS?|PYTHON|WORKERS|MASTER_(ADDR|PORT)|BASH_ENV|IFS")
_SECRET = re.compile(r"(?i)(.*_)?(api_?key|access_?key|token|secret|passw(or)?d|credential)s?(_.*)?")
_ASSIGNMENT = re.compile(r"(?:^|[\s;&|])([A-Za-z_]\w*)=(?![\"']?[$`])[\"']?[^\s\"';]")  # of a literal: not X=$Y
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def write_script(
    recipe: Recipe,
    topology: Topology,
    run_dirs: Sequence[Path],
    *,
    log_dir: Path,
    folders: Sequence[Path] = (),
    python: str = sys.executable,
) -> str:
    """The text of the batch script.

    Args:
        recipe: resolved; of a sweep, any member: what differs between members does not reach the script.
        topology: of the recipe.
        run_dirs: the run directory, absolute; of a sweep one for each task of the array, in order.
        log_dir: where the output of the script goes, one file for each job.
        folders: what a container needs besides the run directories: see `data_folders`.
        python: an interpreter that has tplaunch, at the same path on every node (also outside a container).

    Raises:
        RecipeError: something that Slurm or the shell cannot be given; all of it at once.
    """
    problems = list(find_problems(recipe, topology, [*run_dirs, log_dir, *folders]))
    if problems:
        raise RecipeError(*problems)
    return "\n\n".join(
        [
            _header(recipe, topology, run_dirs, log_dir),
            _environment(recipe),
            _what_runs(recipe, topology, run_dirs, folders, python),
            how_it_runs(recipe.launch.slurm.container.runtime if recipe.launch.slurm.container else None),
        ]
    )


def find_problems(recipe: Recipe, topology: Topology, paths: Sequence[Path]) -> Iterator[Problem]:
    """What keeps a recipe from becoming a script."""
    slurm = recipe.launch.slurm
    yield from option_problems(slurm)
    for name in slurm.modules:
        if not _MODULE.fullmatch(name):
            yield Problem(f"{name!r} is no name of a module", key="launch.slurm.modules")
    for name, value in slurm.env.items():
        key = f"launch.slurm.env.{name}"
        if not _VARIABLE.fullmatch(name):
            yield Problem(f"{name!r} is no name of an environment variable", key="launch.slurm.env")
        elif _RESERVED.fullmatch(name):
            yield Problem("is set by Slurm or tplaunch itself", key=key)
        elif _SECRET.fullmatch(name):
            yield _secret(name, key)
        if "\0" in value or not _encodable(value):
            yield Problem("holds a character that no environment can", key=key)
    if slurm.setup and not _is_shell(slurm.setup):
        fix = "try it: bash -n"
        yield Problem(
            "is no complete shell text", why="a quote or bracket is left open", fix=fix, key="launch.slurm.setup"
        )
    for name in [match[1] for line in slurm.setup for match in _ASSIGNMENT.finditer(line)]:
        if _SECRET.fullmatch(name):
            yield _secret(name, "launch.slurm.setup")
    if topology.world_size != topology.nodes * topology.ranks_per_node:
        what = f"{topology.world_size} ranks do not fill {topology.nodes} nodes of {topology.ranks_per_node}"
        yield Problem(what, fix="sizes whose product fills every node", key="topology")
    for part in segments(recipe)[1:]:
        other = Topology.of(part.recipe)
        if (other.nodes, other.ranks_per_node) != (topology.nodes, topology.ranks_per_node):
            yield Problem(
                f"asks for {other.nodes} x {other.ranks_per_node} ranks in stage {part.stages.start + 1}, for "
                f"{topology.nodes} x {topology.ranks_per_node} before",
                why="a job keeps its nodes and the processes on each from its begin to its end",
                fix="topologies of as many ranks, such as more dp where tp or pp is less",
                key=f"training.stages[{part.stages.start}].topology",
            )
    if slurm.container is not None:
        image = slurm.container.image
        if not image or image.startswith("-") or _CONTROL.search(image) or not _encodable(image):
            yield Problem(f"{image!r} is no image", key="launch.slurm.container.image")
        for mount in slurm.container.mounts:
            if not re.fullmatch(r"/[^:,\x00-\x1f\x7f]*(:/[^:,\x00-\x1f\x7f]*(:[a-z]+)?)?", mount) or not _encodable(
                mount
            ):
                fix = "such as /data:/data or /data:/data:ro"
                yield Problem(f"{mount!r} is no mount", fix=fix, key="launch.slurm.container.mounts")
    for path in paths:
        if _CONTROL.search(str(path)) or "\\" in str(path) or not _encodable(str(path)):
            why = "Slurm takes a backslash or control character in a log's path for its own"
            yield Problem(f"no run directory of a Slurm job: {str(path)!r}", why=why, fix="another --run-dir")
        if slurm.container is not None and re.search("[:,]", str(path)):
            yield Problem(f"cannot be mounted in a container: {path}", why="it has a : or ,", fix="another --run-dir")


def _secret(name: str, key: str) -> Problem:
    return Problem(
        f"{name} looks like a secret",
        why="the recipe and the script lie in the run directory, where others may read them",
        fix=f"take it out and `export {name}=...` in the shell that submits: sbatch passes it on",
        key=key,
    )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_shell(lines: Sequence[str]) -> bool:
    text = "\n".join(lines)
    if "\0" in text or not _encodable(text):
        return False
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


def _header(recipe: Recipe, topology: Topology, run_dirs: Sequence[Path], log_dir: Path) -> str:
    rows = sbatch_options(recipe, topology, tasks=len(run_dirs), log_dir=log_dir)
    return "\n".join(["#!/bin/bash", *_aligned([(f"#SBATCH {option}", why) for option, why in rows])])


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Code and comment, the comments in one column unless the code is long."""
    width = max((len(code) for code, why in rows if why and len(code) <= 44), default=0)
    return [f"{code:{width}}  # {why}" if why else code for code, why in rows]


def _environment(recipe: Recipe) -> str:
    slurm = recipe.launch.slurm
    lines = [
        "# ---- the environment; what is exported where the job is submitted (WANDB_API_KEY, ...) comes along",
        "set -e",
    ]
    if slurm.modules:
        lines += ["command -v module >/dev/null || source /etc/profile  # a batch shell may not know `module` yet"]
        lines += [f"module load {name}" for name in slurm.modules]
    lines += slurm.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in slurm.env.items()]
    lines += _aligned(
        [
            ("export NCCL_DEBUG=${NCCL_DEBUG:-WARN}", "NCCL says why it fails"),
            ("export PYTHONFAULTHANDLER=1", "a crash in native code leaves the Python stack in the rank's log"),
            ("export PYTHONUNBUFFERED=1", "what a rank prints can be followed"),
            ("export SLURM_EXPORT_ENV=ALL", "srun hands all this on, also where the site's default is NONE"),
        ]
    )
    return "\n".join(lines)


def _what_runs(
    recipe: Recipe, topology: Topology, run_dirs: Sequence[Path], folders: Sequence[Path], python: str
) -> str:
    lines = ["# ---- what runs"]
    if len(run_dirs) > 1:
        lines += ["RUN_DIRS=(", *(f"    {shlex.quote(str(path))}" for path in run_dirs), ")"]
        first = ("export RUN_DIR=${RUN_DIRS[SLURM_ARRAY_TASK_ID]}", "this task's member of the sweep")
    else:
        first = (
            f"export RUN_DIR={shlex.quote(str(run_dirs[0]))}",
            "recipe, logs, checkpoints; on a shared file system",
        )
    lines += _aligned(
        [
            first,
            (f"export PYTHON={shlex.quote(python)}", "has tplaunch; the same path on every node"),
            (f"export WORKERS={topology.ranks_per_node}", "ranks a node"),
        ]
    )
    container = recipe.launch.slurm.container
    if container is not None:
        mounts = ",".join(all_mounts(container.mounts, [*run_dirs, *folders]))
        if container.runtime == "pyxis":
            values = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        else:
            nv = ["--nv"] if recipe.launch.slurm.gpus else []
            values = ["apptainer", "exec", *nv, "--bind", mounts, container.image]
        # Quoted even where the shell needs it not: a comma outside quotes looks like a slip to a reader.
        lines += ["CONTAINER=(", *(f"    {shlex.quote(value + ' ')[:-2]}'" for value in values), ")"]
    return "\n".join(lines)


def data_folders(recipe: Recipe) -> list[Path]:
    """The folders of the data and of the tokenizer of a resolved recipe."""
    files = [source.path for source in [*recipe.corpora, *recipe.data.sources("validation")]]
    files += [recipe.data.tokenizer] if isinstance(recipe.data.tokenizer, str) else []
    return [Path(file).parent for file in files]


def all_mounts(mounts: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The recipe's mounts, and one for each folder that none of them shows under its own path already."""
    found = list(mounts)
    for folder in folders:
        shown = [mount.split(":")[0] for mount in found if len(set(mount.split(":")[:2])) == 1]
        if not any(folder.is_relative_to(path) for path in shown):
            found.append(f"{folder}:{folder}")
    return found


def how_it_runs(runtime: str | None) -> str:
    """The part of the script that no recipe changes, for a container runtime or none."""
    options, prefix, python = {
        None: ("", "", '"$PYTHON"'),
        "pyxis": (' "${CONTAINER[@]}"', "", "python3"),
        "apptainer": ("", '"${CONTAINER[@]}" ', "python3"),
    }[runtime]
    return rf"""# ---- the nodes: each is checked, a bad one is left out of the next attempt; ranks follow the switches
trap "" USR2                                   # asks ranks that train for a profile, and must end nothing else
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > WORKERS ? SLURM_CPUS_PER_TASK / WORKERS : 1))
EACH_NODE=(
    --ntasks-per-node=1
    --cpus-per-task="$SLURM_CPUS_PER_TASK"     # since Slurm 22.05 srun does not take it over from sbatch
    --kill-on-bad-exit=1                       # one node failed: end the others, they would wait for it
)
HOSTS=$RUN_DIR/slurm/hosts-$SLURM_JOB_ID
srun "${{EACH_NODE[@]}}"{options} {prefix}{python} -m tplaunch.slurm.node_check "$RUN_DIR" |
    "$PYTHON" -m tplaunch.slurm.job nodes "$RUN_DIR" >"$HOSTS"
export SLURM_HOSTFILE=$HOSTS                   # the order of the nodes below (--distribution=arbitrary)
MASTER_ADDR=$(head -n 1 "$HOSTS")              # ranks meet on the first node,
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # at a port below the range that systems give out themselves
export MASTER_ADDR MASTER_PORT

# ---- the run: one torchrun a node. slurm_job stays above it: it numbers the attempt, hands Slurm's signals on, and
# when the ranks have ended decides: done, stopped, failed, once more, or back to the queue.
# shellcheck disable=SC2016 # expanded on each node, not here
exec "$PYTHON" -m tplaunch.slurm.job run "$RUN_DIR" \
    srun "${{EACH_NODE[@]}}" --distribution=arbitrary{options} {prefix}bash -c '
        trap "" TERM USR1 USR2  # Slurm sends these to the ranks too, which act on them; torchrun waits
        exec {python} -m torch.distributed.run \
            --nnodes="$SLURM_NNODES" --node-rank="$SLURM_PROCID" --nproc-per-node="$WORKERS" \
            --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
            --signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m {WORKER} "$RUN_DIR"'
"""
