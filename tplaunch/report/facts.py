"""All that is told of one run, gathered once for `show` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tplaunch.checkpoint import store
from tplaunch.files import Record, read_lines
from tplaunch.report.curves import Curves
from tplaunch.report.family import family
from tplaunch.report.prediction import Figure, figures, memory_by_stage, read_plan
from tplaunch.report.rows import Row, rows_of
from tplaunch.report.story import Attempt, Mark, attempts, marks, say
from tplaunch.run.directory import RunDir
from tplaunch.run.evaluations import read_evaluations
from tplaunch.run.events import Initialized
from tplaunch.run.samples import read_samples

_SAMPLES = 12  # texts that are shown: the newest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there."""

    step: int
    path: Path
    size: int
    time: float
    damage: str


@dataclass(frozen=True)
class RunFacts:
    """A run, read whole.

    Args:
        no_plan: why there is no plan.
        stages: memory by pipeline rank.
        environment: versions, machine, job: name -> text.
        samples: generated texts, newest last: step, prompt, text.
        recipe: the text of the recipe.
        evaluations: what its checkpoints were found to know, oldest first (`run.evaluations`).
        initial: whose weights it began with, where not with its own; in words.
        family: the tree of branches that it stands in, as (depth, run); empty where it is alone.
    """

    row: Row
    curves: Curves
    plan: Record | None
    no_plan: str
    figures: list[Figure]
    stages: list[Figure]
    attempts: list[Attempt]
    marks: list[Mark]
    checkpoints: list[Checkpoint]
    environment: dict[str, str]
    samples: list[Record]
    recipe: str
    evaluations: list[Record]
    initial: str = ""
    family: Sequence[tuple[int, Row]] = ()

    @classmethod
    def of(cls, run: RunDir) -> RunFacts:
        """Read a run."""
        history, curves = run.history(), Curves.of(run)
        tree = family(run)
        row, *others = rows_of([run, *(one for _, one in tree)], tree[0][1].root.parent)[0]
        plan, no_plan = read_plan(run)
        return cls(
            row=replace(row, name=run.root.absolute().name),
            curves=curves,
            plan=plan,
            no_plan=no_plan,
            figures=figures(plan, curves, row.steps),
            stages=memory_by_stage(plan, curves),
            attempts=(found := attempts(history)),
            marks=marks(history, curves),
            initial=next((say(event) for event in history.events if isinstance(event, Initialized)), ""),
            checkpoints=_checkpoints(run),
            environment=_environment(run, found, plan),
            samples=read_samples(run)[-_SAMPLES:],
            recipe=_text(run.recipe),
            evaluations=read_evaluations(run),
            family=[(depth, one) for (depth, _), one in zip(tree, others, strict=True)] if len(tree) > 1 else [],
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for --json: without the curves, which are in metrics.jsonl."""
        best = self.curves.best("loss")
        return {
            **self.row.as_dict(),
            "best_loss": None if best is None else {"step": best[0], "loss": best[1]},
            "bad_metrics_lines": self.curves.bad,
            "predicted_and_measured": [{**asdict(one), "ratio": one.ratio} for one in self.figures],
            "memory_by_pipeline_rank": [{**asdict(one), "ratio": one.ratio} for one in self.stages],
            "attempts": [asdict(one) for one in self.attempts],
            "events": [asdict(one) for one in self.marks],
            "checkpoints": [{**asdict(one), "path": str(one.path)} for one in self.checkpoints],
            "environment": self.environment,
            "evaluations": self.evaluations,
            "family": [
                {"depth": depth, "run": str(one.run), "parent": one.parent, "parent_step": one.parent_step}
                for depth, one in self.family
            ],
        }


def _checkpoints(run: RunDir) -> list[Checkpoint]:
    found = []
    for step, path in store.list_checkpoints(run.checkpoints):
        try:
            damage = store.damage(path, store.read_manifest(path), read_files=False)
        except ValueError as error:
            damage = [str(error)]
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        found.append(Checkpoint(step, path, size, path.stat().st_mtime, "; ".join(damage)))
    return found


def _environment(run: RunDir, found: Sequence[Attempt], plan: Record | None) -> dict[str, str]:
    """Where and by what a run was trained: of the newest checkpoint, the last attempt and what ranks noted."""
    values: dict[str, str] = {}
    for _, path in store.list_checkpoints(run.checkpoints)[-1:]:
        try:
            about = store.read_manifest(path).about
        except ValueError:
            continue
        values |= {name: str(about[name]) for name in ("tplaunch", "torch", "python") if about.get(name)}
        if isinstance(about.get("parameters"), int):
            values["parameters"] = f"{about['parameters']:,}"
    if plan is not None:
        values["planned for GPU"] = plan["gpu"]
    if found:
        last = found[-1]
        values |= {
            name: text for name, text in (("Slurm job", last.job), ("nodes", ", ".join(map(str, last.nodes)))) if text
        }
    hosts = {str(row["host"]) for row in read_lines(run.ranks) if row.get("host")}
    if hosts and "nodes" not in values:
        values["nodes"] = ", ".join(sorted(hosts))
    holder = next(iter(read_lines(run.lock_file)), {})
    if holder.get("host"):
        values["launched on"] = str(holder["host"])
    return values


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
