"""What a recipe asks of sbatch: the #SBATCH lines, and what keeps a value from becoming one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe, Slurm
from tplaunch.spec.topology import Topology
from tplaunch.units import format_slurm_memory, format_slurm_time

MOST_GRACE = 65535  # seconds; sbatch --signal takes no more
CPUS_PER_GPU = 4  # the default; GPU nodes everywhere have as many

# What Slurm allows in names: no space, quote, # or control character, so that an #SBATCH line needs no quotes.
_NAMES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@:+-]*")
_HOSTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*")
_FEATURES = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:&|*()\[\]+-]*")
_PATTERNS = {
    **dict.fromkeys(("partition", "account", "qos", "reservation", "mail_user"), _NAMES),
    **dict.fromkeys(("nodelist", "exclude"), _HOSTS),
    "constraint": _FEATURES,
    "gpu_type": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*"),
    "licenses": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:;|@/+-]*"),
    "switches": re.compile(r"\d+(@[\d:-]+)?"),
    "dependency": re.compile(r"[a-z]+(:[\w+]+)*([,?][a-z]+(:[\w+]+)*)*"),
    "mail_type": re.compile(r"[A-Z_0-9]+(,[A-Z_0-9]+)*", re.IGNORECASE),
}
_ANY_TEXT = re.compile(r"[^\x00-\x1f\x7f\\]*")  # what _sbatch_quote can quote
_OPTION = re.compile(r"--([a-z][a-z0-9-]+)(?:=(.*))?", re.DOTALL)

# Keys of the section that are sbatch's options by the same name.
_ALIKE = ["partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "licenses", "switches"]
_ALIKE += ["dependency", "mail_type", "mail_user"]
# What a line of `launch.slurm.sbatch` may not say, and where it is said instead; "": nowhere.
_TAKEN = {
    **{key.replace("_", "-"): f"launch.slurm.{key}" for key in (*_ALIKE, "time", "mem", "cpus_per_task")},
    **dict.fromkeys(("comment", "exclusive", "requeue"), "launch.slurm.{}"),
    "job-name": "name",
    "nodes": "topology.nodes",
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"), ""),
    **dict.fromkeys(("gres", "gpus-per-node"), "topology.gpus_per_node and launch.slurm.gpu_type"),
    **dict.fromkeys(("gpus", "gpus-per-task", "gpus-per-socket"), "topology.gpus_per_node"),
    "no-requeue": "launch.slurm.requeue",
    "signal": "launch.slurm.grace",
    "array": "--sweep of tplaunch submit",
    **dict.fromkeys(("output", "error"), "--run-dir of tplaunch submit"),
    "wait": "--wait of tplaunch submit",
    "test-only": "--dry-run of tplaunch submit",
    **dict.fromkeys(("open-mode", "parsable", "clusters", "cluster", "wrap", "help", "usage", "version"), ""),
}


def cpus_per_node(recipe: Recipe, topology: Topology) -> int:
    """The CPUs that a job asks for on each node."""
    slurm = recipe.launch.slurm
    return slurm.cpus_per_task or (CPUS_PER_GPU if slurm.gpus else 1) * topology.ranks_per_node


def sbatch_options(recipe: Recipe, topology: Topology, *, tasks: int, log_dir: Path) -> list[tuple[str, str]]:
    """The options of a job's script, each with its reason.

    Args:
        recipe, topology: see `tplaunch.slurm.script.write_script`.
        tasks: of the array; 1: no array.
        log_dir: where the output of the script goes.
    """
    slurm = recipe.launch.slurm
    sizes = f"{topology.world_size} ranks = {topology.sizes}"
    sizes += f", experts {topology.expert_sizes}" if topology.expert_sizes else ""
    rows = [
        (f"--job-name={recipe.name}", "as squeue shows it"),
        (f"--nodes={topology.nodes}", sizes),
        ("--ntasks-per-node=1", "one torchrun a node, which starts the node's ranks"),
    ]
    if slurm.gpus:
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        rows += [(f"--gres=gpu:{kind}{topology.ranks_per_node}", "one GPU a rank")]
    cpus = cpus_per_node(recipe, topology)
    rows += [(f"--cpus-per-task={cpus}", "for all ranks of the node together; Slurm's default is one")]
    if slurm.mem is not None:
        rows += [
            (f"--mem={format_slurm_memory(slurm.mem)}", "memory of each node" if slurm.mem else "all of each node")
        ]
    if slurm.time is not None:
        rows += [(f"--time={format_slurm_time(slurm.time)}", "limit of one attempt, not of the run")]
    for field in _ALIKE:
        value = getattr(slurm, field)
        if value is not None:
            rows += [(f"--{field.replace('_', '-')}={value}", "")]
    if slurm.exclusive:
        own = "" if slurm.exclusive is True else f"={slurm.exclusive}"
        rows += [(f"--exclusive{own}", "shares its nodes with no other job" if not own else "")]
    if slurm.comment is not None:
        rows += [(f"--comment={_sbatch_quote(slurm.comment)}", "")]
    for line in slurm.sbatch:
        name, equals, value = line.partition("=")
        rows += [(f"{name}{equals}{_sbatch_quote(value)}" if equals else name, "launch.slurm.sbatch")]
    if slurm.requeue:
        rows += [("--requeue", "after preemption, the time limit or the loss of a node: wait in the queue again")]
    else:
        rows += [("--no-requeue", "launch.slurm.requeue is off")]
    rows += [
        (f"--signal=B:USR1@{math.ceil(slurm.grace)}", "so many seconds before the limit this script is told to stop"),
        ("--open-mode=append", "later attempts of the job add to the log"),
    ]
    if tasks > 1:
        rows += [(f"--array=0-{tasks - 1}", "one task for each member of the sweep")]
    name = "%A_%a.log" if tasks > 1 else "%j.log"
    return [*rows, (f"--output={_sbatch_quote(str(log_dir).replace('%', '%%') + '/' + name)}", "")]


def option_problems(slurm: Slurm) -> Iterator[Problem]:
    """What sbatch could not be given."""
    for field, pattern in _PATTERNS.items():
        value = getattr(slurm, field)
        if value is not None and not pattern.fullmatch(str(value)):
            yield Problem(
                f"{value!r} is no {_WORDS.get(field, 'name')} that Slurm can have", key=f"launch.slurm.{field}"
            )
    if slurm.comment is not None and not _can_be_quoted(slurm.comment):
        what = "holds a backslash or control character, which sbatch takes for its own"
        yield Problem(what, key="launch.slurm.comment")
    if slurm.gpu_type is not None and not slurm.gpus:
        yield Problem("no GPUs are asked for", fix="launch.slurm.gpus: true", key="launch.slurm.gpu_type")
    if slurm.grace > MOST_GRACE:
        yield Problem(f"is more than the {MOST_GRACE} s that sbatch --signal takes", key="launch.slurm.grace")
    if slurm.time is not None and slurm.time <= slurm.grace:
        what = f"{format_slurm_time(slurm.time)} leaves nothing after a grace of {math.ceil(slurm.grace)} s"
        yield Problem(what, fix="a longer time or a shorter launch.slurm.grace", key="launch.slurm.time")
    yield from _extra_problems(slurm.sbatch)


_WORDS = {
    "switches": "number of switches, such as 1 or 1@2:00:00,",
    "dependency": "dependency, such as afterok:123 or singleton,",
    "mail_type": "list of events, such as END,FAIL,",
    "licenses": "list of licenses, such as matlab:2,",
}


def _extra_problems(lines: Sequence[str]) -> Iterator[Problem]:
    for index, line in enumerate(lines):
        key = f"launch.slurm.sbatch[{index}]"
        match = _OPTION.fullmatch(line)
        if match is None or not _can_be_quoted(line):
            yield Problem(f"{line!r} is no option of sbatch", fix='a long one, whole, such as "--wckey=x"', key=key)
            continue
        # sbatch takes the beginning of an option's name for the option.
        own = match[1] if match[1] in _TAKEN else next((name for name in _TAKEN if name.startswith(match[1])), None)
        if own is not None:
            instead = _TAKEN[own].format(own)
            fix = f"say it by {instead}" if instead else "leave it out"
            yield Problem(f"--{own} is set by tplaunch itself", fix=fix, key=key)


def _can_be_quoted(text: str) -> bool:
    return bool(_ANY_TEXT.fullmatch(text)) and not any("\ud800" <= char <= "\udfff" for char in text)


def _sbatch_quote(text: str) -> str:
    """Text as one word of an #SBATCH line, by sbatch's own rules, which are not the shell's."""
    return text if re.fullmatch(r"[\w/.,:@%+=-]+", text) else '"' + text.replace('"', '\\"') + '"'
