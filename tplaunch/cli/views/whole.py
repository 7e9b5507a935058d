"""A whole run of several stages as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from typer import style

from tplaunch.cli.views.table import columns
from tplaunch.plan.estimate import REGULATED_FLOPS
from tplaunch.plan.run import RunPlan, RunStage
from tplaunch.units import GiB, format_bytes, format_count, format_duration


def run_lines(run: RunPlan) -> Iterator[str]:
    """What each stage is and takes, what they take together, and what stays on disk."""
    yield f"{style(run.recipe.name, bold=True)}  {len(run.stages)} stages on {run.stages[0].plan.case.gpu.name}"
    yield _stage_table(run)
    yield in_all(run)
    yield flops_in_words(run)
    kept = run.checkpoints
    many = "one checkpoint" if kept.count == 1 else f"{kept.count:,} checkpoints"
    yield f"{many} of {format_bytes(kept.each)} when the run has ended: {format_bytes(kept.bytes)}"


def _stage_table(run: RunPlan) -> str:
    axes = ["tp", "cp", "pp", "dp", *["ep"] * (run.recipe.model.moe is not None)]
    headings = ["", "stage", "until step", "tokens", "seq_len", "batch", "GPUs", "/".join(axes), "step"]
    headings += ["GPU-hours", "time", "FLOPs", "GiB", "fits"]
    rows = [_row(run, stage, axes) for stage in run.stages]
    capacity = run.stages[0].plan.case.gpu.memory / GiB
    title = f"Stages: with their last batch size; memory of the fullest rank, GiB of {capacity:.1f}"
    return columns(title, headings, rows, frozenset({1, 7}))


def _row(run: RunPlan, stage: RunStage, axes: list[str]) -> list[str]:
    plan, training = stage.plan, stage.plan.case.recipe.training
    topology, last = plan.case.topology, stage.steps.stop - 1
    total = f"{plan.memory[plan.fullest].total / GiB:.1f}"
    return [
        str(stage.number + 1),
        stage.name,
        f"{last:,}",
        format_count(run.course.batches.tokens(last)),
        f"{training.seq_len:,}",
        f"{training.global_batch_size:,}",
        f"{topology.world_size:,}",
        "/".join(str(topology.ep if axis == "ep" else topology.size(axis)) for axis in axes),
        seconds_in_words(plan.step_seconds),
        f"{stage.gpu_hours:,.0f}",
        format_duration(stage.seconds),
        f"{stage.flops:.2e}",
        total if plan.fits else style(total, fg="red", bold=True),
        "yes" if plan.fits else style("no", fg="red", bold=True),
    ]


def seconds_in_words(value: float) -> str:
    """Seconds of a step."""
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def in_all(run: RunPlan) -> str:
    """Steps, tokens, time and GPU-hours."""
    power = all(stage.plan.case.gpu.power for stage in run.stages)
    energy = f", at most {_energy(run.energy_kwh)}" if power else ""
    return (
        f"{run.course.steps:,} steps, {format_count(run.tokens)} tokens: {format_duration(run.seconds)}, "
        f"{run.gpu_hours:,.0f} GPU-hours{energy}"
    )


def flops_in_words(run: RunPlan) -> str:
    """FLOPs of the run, beside those that regulators name."""
    flops = run.total_flops / REGULATED_FLOPS
    against = f"{flops:.2g} of 1e25" if flops < 1 else f"{flops:.2f} times 1e25, which regulators name"
    return f"{run.total_flops:.2e}{' FLOP' * run.staged} in all: {against}"


def _energy(kwh: float) -> str:
    return f"{kwh / 1000:,.1f} MWh" if kwh >= 1000 else f"{kwh:,.1f} kWh"
