"""Makes a run ready within its job, for batch scripts that `tplaunch submit` did not write."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.launch.resume import told
from tplaunch.run.events import Submitted
from tplaunch.slurm import client
from tplaunch.slurm.own_job import own_job_id, say
from tplaunch.slurm.submit import plan_submission, prepare_run


def prepare(argv: Sequence[str]) -> Exit:
    """Make a run ready and print what the script needs to know of it, for `eval`. Runs again at every requeue.

    Args:
        argv: RECIPE [--set KEY=VALUE]... [--run-dir DIR] [--from RUN@STEP] [--allow-change KEY]...

    Raises:
        TplaunchError: the recipe cannot run, does not fit the job's nodes, or is not that of the run's checkpoints.
    """
    parser = argparse.ArgumentParser(prog="train.sbatch", allow_abbrev=False)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--from", dest="parent", metavar="RUN@STEP")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY")
    options = parser.parse_args(argv)
    submission = plan_submission(options.recipe, options.set, run_dir=options.run_dir, parent=options.parent)
    (member,) = submission.members
    topology, allocated = member.checked.topology, int(os.environ["SLURM_NNODES"])
    if topology.nodes != allocated:
        what = f"the recipe asks for {topology.nodes} nodes, the job has {allocated}"
        raise TplaunchError(Problem(what, fix=f"sbatch --nodes={topology.nodes}, or --set topology.nodes={allocated}"))
    for line in told(prepare_run(member, options.allow_change).changes):
        say(f"changed: {line}")
    run_dir, job_id = member.run_dir, own_job_id()
    if job_id not in run_dir.history().submitted_jobs:  # not a later attempt of the same job
        job = client.find_job(job_id)
        run_dir.append(Submitted([job_id], [str(job.log) if job else ""]))
    values = {"RUN_DIR": run_dir.root, "WORKERS": topology.ranks_per_node}
    print("\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in values.items()))
    return Exit.DONE
