"""What `tune` found, as text for the terminal."""

from __future__ import annotations

from tplaunch.cli.views.plan import gib, recompute_text
from tplaunch.cli.views.table import columns
from tplaunch.plan.tune import Tuning
from tplaunch.plan.tune_run import Tuned


def tuning_text(tuning: Tuning, gpus: int, run: Tuned | None = None) -> str:
    """The best topologies, what each loses its time on, and why the best's neighbours are not better.

    Args:
        run: the stages that it was found for.
    """
    rows: list[list[str]] = []
    shares = any(choice.plan.case.topology.cp > 1 for choice in tuning.choices)
    staged = run is not None and run.recipe.training.stages is not None
    experts = tuning.choices[0].plan.case.model.moe is not None
    for place, choice in enumerate(tuning.choices, 1):
        plan, case = choice.plan, choice.plan.case
        topology, parallelism = case.topology, case.recipe.topology
        chunks = f" x{parallelism.virtual_stages}" if parallelism.virtual_stages > 1 else ""
        schedule = f"{parallelism.schedule}{chunks}" if topology.pp > 1 else ""
        rows.append(
            [
                str(place),
                str(topology.tp),
                *([f"{topology.cp} {parallelism.cp_kind}" if topology.cp > 1 else "1"] if shares else []),
                str(topology.pp),
                str(topology.dp),
                *([f"{topology.ep}{f' x {topology.expert_tp}' if topology.expert_tp > 1 else ''}"] if experts else []),
                str(parallelism.zero),
                str(case.recipe.training.micro_batch_size),
                recompute_text(case),
                schedule,
                f"{plan.tokens_per_second / gpus:,.0f}",
                f"{plan.mfu:.1%}",
                gib(plan.memory[plan.fullest].total),
                *([f"{choice.run.gpu_hours:,.0f}"] if staged else []),
                choice.reason,
            ]
        )
    grid = ["tp", *["cp"] * shares, "pp", "dp", *["ep"] * experts, "zero", "micro"]
    headings = ["", *grid, "recompute", "schedule", "tok/s/GPU", "MFU", "GiB", *["GPU-hours"] * staged, "lost on"]
    words = frozenset(headings.index(name) for name in ("cp", "recompute", "schedule", "lost on") if name in headings)
    gpu = tuning.choices[0].plan.case.gpu.name
    title = f"Best of {tuning.legal:,} topologies on {gpus} x {gpu}; {tuning.fitting:,} fit"
    lost = [[str(neighbour.change), neighbour.why] for neighbour in tuning.neighbours]
    if staged and run is not None:
        stages = {stage.number: stage for stage in tuning.choices[0].run.stages}
        title += f"\nFor {stages[run.main].title}"
        if len(stages) > 1:
            which = ", ".join(str(number + 1) for number in stages)
            title += f", the longest of those with the first topology ({which}); in order of their GPU-hours"
    parts = [columns(title, headings, rows, words)]
    if lost:
        parts.append(columns("One step from the best", ["change", "why not"], lost, frozenset({0, 1})))
    return "\n\n".join(parts)
