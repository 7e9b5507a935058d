"""Settings of a run: what contradicts itself, and what has no effect or is probably a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.gpu import find_gpu
from tplaunch.spec.validation import NAME, RESERVED, validation_losses
from tplaunch.units import Length, format_slurm_time


def run_problems(recipe: Recipe) -> Iterator[Problem]:
    training, slurm = recipe.training, recipe.launch.slurm
    if training.eval_every and recipe.data.validation is None and not recipe.eval.tasks:
        yield Problem(
            "there is no validation data to evaluate on",
            fix="give data.validation or eval.tasks, or eval_every: 0",
            key="training.eval_every",
        )
    for one in recipe.data.validation_sets():
        if one.name and (not NAME.fullmatch(one.name) or one.name in RESERVED):
            yield Problem(
                f"{one.name!r} cannot name validation data",
                why=f"it is a part of metrics' names, and {', '.join(RESERVED)} mean something else",
                fix="use letters, digits, - and _; settings stand below a name: {wiki: {path: PATH, steps: 4}}",
                key=one.key,
            )
    best = recipe.checkpoint.keep_best
    if best is not None and best not in (known := validation_losses(recipe)):
        yield Problem(
            f"the run will measure no {best}",
            why=f"it measures {', '.join(known)}" if known else "it validates nothing",
            fix=f"name {known[0]}" if known else "give data.validation and training.eval_every",
            key="checkpoint.keep_best",
        )
    every, exported = recipe.checkpoint.every, recipe.checkpoint.export_every
    at_end = (Length(training.steps), training.length, Length(100, "%"))
    if exported is not None and not (exported.is_multiple_of(every) if every else exported in at_end):
        yield Problem(
            f"no checkpoint is written at all of its multiples: every is {every}",
            why="what is exported is a checkpoint",
            fix=f"export_every: a multiple of {every}" if every else f"checkpoint.every: {exported}",
            key="checkpoint.export_every",
        )
    if training.ema is not None:
        step = training.ema.every
        last = training.steps // step * step
        if last <= training.ema.from_:
            begin = training.ema.from_ // step * step + step
            yield Problem(
                f"the averages begin after step {begin}, and the run has {training.steps}",
                fix=f"from: at most {last - 1}" if last else f"every: at most {training.steps}",
                key="training.ema",
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
    every, kept, validated = checkpoint.every, checkpoint.keep_every, training.eval_every
    if checkpoint.keep_best and validated and not (every and every.is_multiple_of(validated)):
        yield Problem(
            f"compares only checkpoints of validated steps: every {every} is not a multiple of "
            f"training.eval_every {validated}",
            fix=f"checkpoint.every: {validated}, or a multiple of it",
            key="checkpoint.keep_best",
        )
    if kept is not None and not kept.is_multiple_of(every):
        yield Problem(
            f"keep_every {kept} is not a multiple of every {every}: only steps that are multiples of both stay",
            key="checkpoint.keep_every",
        )
