"""Which events somebody should hear of at once, and in which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tplaunch.errors import Exit
from tplaunch.run.events import (
    AttemptEnded,
    BadNodes,
    Event,
    ExportFailed,
    Fault,
    LossSpiked,
    RolledBack,
    SaveFailed,
    Stopped,
    Straggled,
)


@dataclass(frozen=True)
class Alert:
    """A message to people.

    Args:
        title: at most 64 characters.
        text: one line.
        level: as W&B has them.
    """

    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"] = "WARN"


def alert_of(event: Event) -> Alert | None:
    """The message of an event; None for those that are part of a good run."""
    match event:
        case AttemptEnded(code=Exit.FAILED, attempt=attempt, why=why):
            return Alert("run failed", f"attempt {attempt} failed: {why}", "ERROR")
        case BadNodes(nodes=nodes):
            return Alert("nodes are not fit", f"left out: {', '.join(nodes)}")
        case Fault(kind=kind, step=step):
            return Alert("fault", f"{kind} at step {step}", "ERROR")
        case Stopped(step=step, by=by):
            return Alert("run stopped", f"told to stop{f' by {by}' if by else ''}: step {step} is saved, it can go on")
        case LossSpiked(step=step, loss=loss, median=median):
            return Alert("loss spike", f"loss {loss:.4g} at step {step}, the median before it is {median:.4g}")
        case RolledBack(step=step, checkpoint=checkpoint):
            return Alert("rolled back", f"after step {step}, to the checkpoint of step {checkpoint}")
        case Straggled(step=step, rank=rank, node=node, ratio=ratio):
            return Alert("straggler", f"step {step}: rank {rank} on node {node} takes {ratio} times the median")
        case SaveFailed(step=step, why=why):
            return Alert("checkpoint failed", f"of step {step}, training goes on: {why}", "ERROR")
        case ExportFailed(step=step, why=why):
            return Alert("export failed", f"of step {step}, training goes on: {why}", "ERROR")
    return None
