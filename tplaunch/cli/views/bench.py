"""A bench as text for the terminal."""

from __future__ import annotations

from tplaunch.bench.run import Bench
from tplaunch.cli.views.table import columns
from tplaunch.plan.estimate import Plan
from tplaunch.units import format_bytes


def bench_text(result: Bench, plan: Plan | None) -> str:
    """The measured step, beside what the planner says of it where it knows the GPU."""
    step, checked = result.step_seconds, result.checked
    lines = [
        f"{checked.recipe.name}: {checked.describe()}",
        f"step      {step:.3g} s, the median of {len(result.seconds)} "
        f"({min(result.seconds):.3g} to {max(result.seconds):.3g})",
        f"tokens/s  {result.tokens_per_second:,.0f}",
        f"TFLOP/s   {result.flops_per_gpu / 1e12:.3g} per rank",
    ]
    if plan is not None:
        lines.append(f"MFU       {result.mfu(plan):.1%} of {plan.case.gpu.name}")
        lines.append(f"planned   {plan.step_seconds:.3g} s a step, {plan.step_seconds / step - 1:+.0%}")
    lines.append(f"memory    {format_bytes(result.peak_memory)} at most on a rank")
    rest = step - sum(result.kernels.values())
    kernels = {**result.kernels, "communication, waiting, Python": max(0.0, rest)}
    for title, seconds in (("parts of a step", result.parts), ("kernels of a step", kernels)):
        rows = [[name, f"{value:.3g} s", f"{value / step:.0%}"] for name, value in seconds.items()]
        lines.append(columns(f"\n{title}, mean of the ranks", ["", "", ""], rows, frozenset({0})))
    return "\n".join(lines)
