"""What a checkpoint holds: progress, and every tensor under its global name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tplaunch.checkpoint.store import EMA
from tplaunch.model.build import Stage


@dataclass
class TrainingProgress:
    """What a checkpoint remembers beside the tensors.

    Args:
        step: steps done.
        updates: steps whose update was made; the others had a non-finite loss or gradient.
        nonfinite: such others in a row, up to now.
        skipped: such others in all.
        samples: consumed, also by steps whose update was not made: the place in the data.
        tokens: trained on.
        flops: model FLOPs spent.
        losses: of the last steps, where `training.loss_spike` asks for them.
        averaged: updates of the averaged weights (`training.ema`).
        record_steps: finite steps since the last metrics record.
        record_loss, record_grad_norm: sums over them.
    """

    step: int = 0
    updates: int = 0
    nonfinite: int = 0
    skipped: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    losses: list[float] = field(default_factory=list)
    averaged: int = 0
    record_steps: int = 0
    record_loss: float = 0.0
    record_grad_norm: float = 0.0

    @classmethod
    def read(cls, state: Mapping[str, Any], *, seq_len: int, now_seq_len: int) -> TrainingProgress:
        """The progress that a checkpoint remembers.

        Args:
            state: as it was written; those of the first version lack `samples`.
            seq_len: that it was trained with.
            now_seq_len: that the run goes on with; where it differs, tokens consumed give the place.
        """
        values = dict(state)
        if "samples" not in values or seq_len != now_seq_len:
            values["samples"] = -(-values["tokens"] // now_seq_len)
        return cls(**values)


def named_tensors(
    stages: list[Stage], optimizer_state: Iterable[tuple[str, Tensor]], averages: Iterable[tuple[str, Tensor]] = ()
) -> list[tuple[str, Tensor]]:
    """Everything that a checkpoint stores, with its global name; the tensors are the live ones. Of a model that is
    frozen beneath adapters, the adapters alone.

    A name comes twice on a rank that holds a tied embedding and its copy (V schedules).

    Args:
        stages: this rank's stages: `model.<parameter>`, and `model.<buffer>`, which is no DTensor.
        optimizer_state: its optimizer's state by "<parameter>.<slot>": `optimizer.<parameter>.<slot>`.
        averages: averaged weights by parameter: `ema.<parameter>`.
    """
    found = [pair for stage in stages for pair in _of_stage(stage, weights=not stage.frozen, adapters=True)]
    found += [(f"optimizer.{name}", tensor) for name, tensor in optimizer_state]
    return found + [(f"{EMA}{name}", tensor) for name, tensor in averages]


def model_tensors(stages: list[Stage]) -> list[tuple[str, Tensor]]:
    """Of these what is the model's own, without adapters: what a new run takes over from another."""
    return [pair for stage in stages for pair in _of_stage(stage, weights=True, adapters=False)]


def _of_stage(stage: Stage, *, weights: bool, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    for shard in stage.sharding.shards:
        if adapters if shard.parameter.role == "adapter" else weights:
            yield f"model.{shard.parameter.name}", shard.layout.detach()
    if weights:
        yield from ((f"model.{name}", buffer) for name, buffer in stage.buffers.items())
