"""What happens to a run, as typed events: one dataclass each, one JSON line each in `events.jsonl`.

A line is `{"event": NAME, "time": unix seconds, **fields}`. Names and fields are public: people and dashboards read
them, and every version reads the files of those before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from tplaunch.files import Record


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a run.

    Args:
        time: unix seconds.
    """

    name: ClassVar[str] = ""
    time: float = field(default_factory=lambda: round(time.time(), 3))

    def to_record(self) -> Record:
        """The event as a line of `events.jsonl`; fields that are None are left out."""
        values = {key: value for key, value in vars(self).items() if key != "time" and value is not None}
        return {"event": self.name, "time": self.time, **values}


@dataclass(frozen=True)
class Submitted(Event):
    """A run was given to Slurm.

    Args:
        jobs: the numbers of its chain of jobs, in order.
        logs: the files that they write to, in the same order; "" where it is not known.
    """

    name = "submit"
    jobs: list[str]
    logs: list[str]


@dataclass(frozen=True)
class AttemptBegan(Event):
    """A launcher starts the ranks.

    Args:
        attempt: its number, from 1.
        job: of Slurm; "" on this machine.
        nodes: the nodes, in rank order; none on this machine.
    """

    name = "attempt"
    attempt: int
    job: str = ""
    nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AttemptEnded(Event):
    """A launcher has judged an attempt whose ranks have ended.

    Args:
        code: an exit code (`tplaunch.errors.Exit`).
        why: in words.
    """

    name = "attempt_end"
    code: int
    attempt: int = 0
    job: str = ""
    why: str = ""


@dataclass(frozen=True)
class BadNodes(Event):
    """A job's nodes were checked before its ranks started, and some are not fit.

    Args:
        nodes: those.
        problems: what is wrong with each.
    """

    name = "bad_nodes"
    nodes: list[str]
    job: str = ""
    problems: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Started(Event):
    """All ranks of an attempt have met and built their part of the model."""

    name = "start"
    attempt: int = 0
    world_size: int = 0


@dataclass(frozen=True)
class StartedUp(Event):
    """The first step of an attempt has ended.

    Args:
        seconds: of each part of rank 0's start, in order.
    """

    name = "startup"
    seconds: dict[str, float]


@dataclass(frozen=True)
class Initialized(Event):
    """A new run took its weights from a checkpoint, or a Hugging Face folder (`checkpoint.initial`).

    Args:
        path: its directory.
        of_step: the step at which it was written; None of a folder.
    """

    name = "initial"
    path: str
    of_step: int | None = None


@dataclass(frozen=True)
class Branched(Event):
    """A new run goes on from a step of another (`--from`): with its weights, optimizer and place in the data.

    Args:
        step: of that run.
        parent: its directory.
        path: the checkpoint.
    """

    name = "branch"
    step: int
    parent: str
    path: str


@dataclass(frozen=True)
class Resumed(Event):
    """The state after a step was loaded."""

    name = "resume"
    step: int


@dataclass(frozen=True)
class StageBegan(Event):
    """A stage of the run begins with the next step (`training.stages`).

    Args:
        step: before it.
        stage: its number, from 1.
        label: its name, where the recipe gives one.
    """

    name = "stage"
    step: int
    stage: int
    label: str | None = None


@dataclass(frozen=True)
class OtherWorkers(Event):
    """Ranks have ended, so that others go on from their checkpoint: what comes next has another topology, or a model of
    other shapes."""

    name = "other_workers"
    step: int


@dataclass(frozen=True)
class Changed(Event):
    """A launch goes on with other values than the one before it.

    Args:
        changes: dotted key -> [was, now].
        allowed: the keys that --allow-change named.
    """

    name = "changed"
    changes: dict[str, list[Any]]
    allowed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is complete.

    Args:
        seconds: from its begin.
    """

    name = "checkpoint"
    step: int
    path: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class SaveFailed(Event):
    """A checkpoint could not be written; training goes on."""

    name = "checkpoint_failed"
    step: int
    why: str


@dataclass(frozen=True)
class Exported(Event):
    """A checkpoint is there as a Hugging Face folder, too.

    Args:
        seconds: that it took, while training went on.
    """

    name = "export"
    step: int
    path: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class ExportFailed(Event):
    """A checkpoint could not be written as a Hugging Face folder; it is there all the same, and training goes on."""

    name = "export_failed"
    step: int
    why: str


@dataclass(frozen=True)
class CheckpointKept(Event):
    """An old checkpoint could not be deleted; it stays, and training goes on."""

    name = "checkpoint_kept"
    path: str
    why: str


@dataclass(frozen=True)
class CheckpointDamaged(Event):
    """A checkpoint was left out on resume."""

    name = "checkpoint_damaged"
    path: str
    why: str


@dataclass(frozen=True)
class Skipped(Event):
    """A step's update was not made: its loss or a gradient was not finite (null in the file)."""

    name = "skipped"
    step: int
    loss: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True)
class LossSpiked(Event):
    """A step's loss was far above the median of those before."""

    name = "loss_spike"
    step: int
    loss: float
    median: float


@dataclass(frozen=True)
class RolledBack(Event):
    """Weights and optimizer are those of a checkpoint again; the data go on.

    Args:
        step: the last step before.
        checkpoint: the step of the checkpoint.
    """

    name = "rollback"
    step: int
    checkpoint: int


@dataclass(frozen=True)
class Fault(Event):
    """Something broke, or was broken on purpose (`TPLAUNCH_FAULT`)."""

    name = "fault"
    kind: str
    step: int
    rank: int | None = None
    steps: int | None = None
    injected: bool | None = None


@dataclass(frozen=True)
class Validated(Event):
    """The loss over a set of validation data after a step.

    Args:
        of: the set's name, where it has one; "ema" in it: of the averaged weights.
    """

    name = "validation"
    step: int
    loss: float | None = None
    of: str | None = None


@dataclass(frozen=True)
class Evaluated(Event):
    """The model was measured by the tasks of `eval` after a step; training waited meanwhile.

    Args:
        figures: metric -> value.
        seconds: that it took.
    """

    name = "evaluation"
    step: int
    figures: dict[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class Sampled(Event):
    """The model has continued the prompts of `logging.samples`; training waited meanwhile.

    Args:
        count: prompts.
        seconds: that it took.
        prompt, text: the first of them, cut; all are in `samples.jsonl`.
    """

    name = "samples"
    step: int
    count: int
    seconds: float
    prompt: str = ""
    text: str = ""


@dataclass(frozen=True)
class DataPlanned(Event):
    """What an attempt will have read of each corpus of the training data at its end, as the recipe says.

    Args:
        samples: of the run, until its last step.
        corpora: path, tokens, share of the samples, epochs; of conversations how they fit into samples, too
            (`data.amounts.Conversations`).
    """

    name = "data"
    samples: int
    corpora: list[dict[str, Any]]


@dataclass(frozen=True)
class EpochBegan(Event):
    """A step read the first sample of a further epoch of a corpus.

    Args:
        corpora: path, and number of the epoch, from 2.
    """

    name = "epoch"
    step: int
    corpora: list[dict[str, Any]]


@dataclass(frozen=True)
class DataRead(Event):
    """What a run has read of each corpus, up to a step, beside what its weight asks for.

    Args:
        samples: of the run so far.
        corpora: path, samples, share by weight (0 of one that was read before the data were changed and is no more),
            share that was read, epochs.
    """

    name = "data_read"
    step: int
    samples: int
    corpora: list[dict[str, Any]]


@dataclass(frozen=True)
class Straggled(Event):
    """A rank holds the others up.

    Args:
        ratio: times the median rank's step.
    """

    name = "straggler"
    step: int
    rank: int
    node: int
    tp: int
    dp: int
    pp: int
    ratio: float
    cp: int | None = None


@dataclass(frozen=True)
class WandbOpened(Event):
    """How Weights & Biases records the run.

    Args:
        mode: online, offline, disabled, or broken.
        id: of the W&B run.
        problem: why it is not what was asked for.
    """

    name = "wandb"
    mode: str
    id: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class TensorboardFailed(Event):
    """TensorBoard's files could not be written; training goes on without."""

    name = "tensorboard_failed"
    why: str


@dataclass(frozen=True)
class Profiled(Event):
    """Steps of a rank were profiled.

    Args:
        first, last: the steps.
        trace: a file for Perfetto or chrome://tracing.
        memory: a snapshot of a GPU's memory, for https://docs.pytorch.org/memory_viz.
    """

    name = "profiled"
    first: int
    last: int
    rank: int
    trace: str
    memory: str | None = None


@dataclass(frozen=True)
class ProfileFailed(Event):
    """Steps of a rank could not be profiled; training goes on."""

    name = "profile_failed"
    rank: int
    why: str


@dataclass(frozen=True)
class Stopped(Event):
    """Training ended on request, with a complete checkpoint.

    Args:
        by: the name of the signal.
    """

    name = "stopped"
    step: int
    by: str | None = None


@dataclass(frozen=True)
class Done(Event):
    """Training reached the recipe's last step, whose checkpoint is complete."""

    name = "done"
    step: int


KINDS: dict[str, type[Event]] = {kind.name: kind for kind in Event.__subclasses__()}


def parse_event(record: Mapping[str, Any]) -> Event | None:
    """The event of a line; None for one of another version, or that lacks a field or has one of another
    type. Unknown fields are left out."""
    kind = KINDS.get(record.get("event", ""))
    if kind is None:
        return None
    values = {f.name: record[f.name] for f in fields(kind) if _is_a(record.get(f.name), str(f.type))}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    return kind(**values) if needed <= values.keys() else None


_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str, "bool": bool}


def _is_a(value: Any, annotation: str) -> bool:
    """Whether a value of a file, which anybody may have edited, is of a field's type."""
    known = _TYPES.get(annotation.removesuffix(" | None"), (list, dict))
    return isinstance(value, known) and not (isinstance(value, bool) and known is not bool)
