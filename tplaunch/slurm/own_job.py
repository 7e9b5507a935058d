"""What a program inside a Slurm job knows of its job, and does to it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from tplaunch.errors import TplaunchError
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.slurm import client

GIVE_UP = 3  # attempts in a row that end without a new checkpoint


def own_job_id(environ: Mapping[str, str] = os.environ) -> str:
    """This job's number in the form that Slurm's commands accept; a task of an array is "array_task"."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


def own_job(job_id: str) -> client.Job | None:
    """What Slurm knows of this job; None where its controller is away just now."""
    try:
        return client.find_job(job_id)
    except TplaunchError as error:
        say(str(error))
        return None


def may_requeue(run_dir: RunDir) -> bool:
    """Whether the recipe lets the job go back to the queue."""
    return load_recipe(run_dir.recipe).recipe.launch.slurm.requeue


def requeue(job_id: str, *, exclude: Sequence[str] = ()) -> bool:
    """Send this job back to the queue, and say whether Slurm lets it. Slurm then ends this process."""
    # Slurm's TERM comes at once, to the commands started here too; they inherit that it is ignored.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        client.requeue(job_id)
        if exclude:
            client.exclude_nodes(job_id, exclude)
    except TplaunchError as error:
        say(f"{error}\n  fix: submit again; on clusters without requeue: tplaunch submit --chain N")
        return False
    say("back to the queue" + (f" without {', '.join(exclude)}" if exclude else ""))
    return True


def cancel_rest(run_dir: RunDir, job_id: str) -> None:
    """Cancel the later jobs of this run's chain."""
    try:
        client.cancel(run_dir.history().jobs_after(job_id))
    except TplaunchError as error:  # they will see for themselves that the run is done
        say(str(error))


def say(text: str) -> None:
    """Print one line into the job's log. To standard error: standard output of `nodes` is its result."""
    print(f"tplaunch: {text}", file=sys.stderr, flush=True)
