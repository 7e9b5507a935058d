"""Settings of a run: what contradicts itself, and what has no effect or is probably a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.gpu import find_gpu
from tplaunch.units import format_slurm_time


def run_problems(recipe: Recipe) -> Iterator[Problem]:
    training, slurm = recipe.training, recipe.launch.slurm
    if training.eval_every and recipe.data.validation is None and not recipe.eval.tasks:
        yield Problem(
            "there is no validation data to evaluate on",
            fix="give data.validation or eval.tasks, or eval_every: 0",
            key="training.eval_every",
        )
    if slurm.time is not None and slurm.grace >= slurm.time:
        yield Problem(
            f"grace {slurm.grace:g}s is not shorter than the job's time {format_slurm_time(slurm.time)}",
            key="launch.slurm.grace",
        )
    if recipe.hardware.gpu is not None:
        try:
            find_gpu(recipe.hardware.gpu)
        except TplaunchError as error:
            yield from (replace(problem, key="hardware.gpu") for problem in error.problems)


def run_warnings(recipe: Recipe) -> Iterator[Problem]:
    training, parallelism, checkpoint = recipe.training, recipe.topology, recipe.checkpoint
    if recipe.data.validation is not None and not training.eval_every:
        yield Problem("is never used: training.eval_every is 0", fix="set training.eval_every", key="data.validation")
    if parallelism.async_tp and not (parallelism.sequence_parallel and parallelism.tp > 1):
        yield Problem(
            "has no effect: what it fuses matmuls with are the collectives of sequence parallelism",
            fix="sequence_parallel: true, and tp above 1",
            key="topology.async_tp",
        )
    if parallelism.pp > 1 and parallelism.zero == 3:
        yield Problem(
            "gathers the parameters again for every microbatch of the pipeline",
            fix="zero: 2 keeps them between microbatches",
            key="topology.zero",
        )
    for key, asked in (
        ("training.loss_spike", training.loss_spike),
        ("training.nonfinite.rollback_after", training.nonfinite.rollback_after),
    ):
        if asked is not None and not checkpoint.every:
            yield Problem(
                "has nothing to go back to: no checkpoint is written before the end",
                fix="set checkpoint.every",
                key=key,
            )
    every, kept = checkpoint.every, checkpoint.keep_every
    if kept is not None and not kept.is_multiple_of(every):
        yield Problem(
            f"keep_every {kept} is not a multiple of every {every}: only steps that are multiples of both stay",
            key="checkpoint.keep_every",
        )
