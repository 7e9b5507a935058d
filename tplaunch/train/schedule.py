"""Microbatches through several pipeline stages, by a schedule of `torch.distributed.pipelining`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from tplaunch.model.build import Stage
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.train.batch import Batch
from tplaunch.train.pipeline import Pipeline, hidden_states


class _Unmanaged(nn.Module):
    """Hides FSDP2 from the schedule: torch would defer every gradient reduction to the end of the step, but ZeRO 2
    and 3 reduce after every microbatch."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(
        self, x: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, loss_scale: float = 1.0
    ) -> Tensor:
        return self.stage(x, labels, positions, loss_scale)


class ScheduledPipeline(Pipeline):
    """Runs batches through the stages of pp > 1 ranks."""

    def __init__(self, stages: list[Stage], mesh: Mesh, recipe: Recipe) -> None:
        super().__init__(stages, mesh, recipe)
        self._schedules: dict[int, Any] = {}

    def train(self, batch: Batch, loss_scale: float) -> Tensor:
        """See `Pipeline.train`."""
        self.set_training(True)
        microbatches = len(batch.tokens) // self.recipe.training.micro_batch_size
        schedule = self._schedule(microbatches)
        for stage in self.stages:
            stage.sharding.begin_step(microbatches)
        losses: list[Tensor] = []
        inputs = (batch.tokens,) if any(s.index == 0 for s in self.stages) else ()
        schedule.step(*inputs, **self._keywords(batch, loss_scale, losses), return_outputs=False)
        self.reshard()
        return self.sum_losses(losses)

    def limit(self, timeout_s: float) -> None:
        """See `Pipeline.limit`; schedules are made anew over the new group."""
        super().limit(timeout_s)
        self._schedules.clear()

    def _keywords(self, batch: Batch, loss_scale: float, losses: list[Tensor]) -> dict[str, object]:
        found: dict[str, object] = {} if batch.positions is None else {"positions": batch.positions}
        if self.has_loss:
            # `target` and `losses` are the schedule's own, which fills the list; the others go to the stage.
            found |= {"target": batch.labels, "losses": losses, "labels": batch.labels, "loss_scale": loss_scale}
        return found

    def _schedule(self, microbatches: int) -> Any:
        """The schedule for so many microbatches; made once for each count (a batch ramp-up has several)."""
        if microbatches not in self._schedules:
            kind: Callable[..., Any] = get_schedule_class(self.recipe.topology.schedule)
            stages = [self._pipeline_stage(stage) for stage in self.stages]
            first = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages  # type: ignore[arg-type]
            # The last stage returns its loss, so the schedule has nothing to compute of its own.
            schedule = kind(first, n_microbatches=microbatches, loss_fn=lambda loss, _: loss, scale_grads=False)
            self._schedules[microbatches] = schedule
        return self._schedules[microbatches]

    def _pipeline_stage(self, stage: Stage) -> PipelineStage:
        training = self.recipe.training
        tokens = torch.empty(training.micro_batch_size, training.seq_len, dtype=torch.int64, device="meta")
        hidden = hidden_states(self.recipe, self.mesh).requires_grad_()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.empty(1, dtype=dtype, device="meta", requires_grad=True)
        first, last = stage.index == 0, stage.index == self.num_stages - 1
        return PipelineStage(
            _Unmanaged(stage.module) if isinstance(stage.module, FSDPModule) else stage.module,
            stage.index,
            self.num_stages,
            self.mesh.device,
            input_args=tokens if first else hidden,
            output_args=loss if last else hidden,
            group=self.group,
        )
