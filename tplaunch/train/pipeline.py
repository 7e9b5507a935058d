"""Microbatches through this rank's stages: a plain loop without pipeline parallelism, else a schedule of
`torch.distributed.pipelining`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    RESHARD,
    UNSHARD,
    PipelineScheduleSingle,
    _Action,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from tplaunch.model.build import Stage
from tplaunch.parallel.data_parallel import COMPUTE_DTYPE, begin_microbatch, units
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.topology import stage_rank
from tplaunch.train.batch import Batch


class _Unmanaged(nn.Module):
    """Hides that a stage is under FSDP2 from the pipeline schedule, which would defer all gradient reduction to the
    end of the step; ZeRO 2 and 3 reduce after every microbatch."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(
        self, x: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, loss_scale: float = 1.0
    ) -> Tensor:
        return self.stage(x, labels, positions, loss_scale)


class Pipeline:
    """Runs batches through the stages.

    Args:
        stages: this rank's stages.
        mesh: the mesh.
        recipe: the recipe.
    """

    def __init__(self, stages: list[Stage], mesh: Mesh, recipe: Recipe) -> None:
        self.stages = stages
        self.mesh = mesh
        self.recipe = recipe
        knobs = recipe.topology
        self.num_stages = knobs.pp * knobs.virtual_stages
        ends = any(s.index in (0, self.num_stages - 1) for s in stages)
        self.reads_data = ends or recipe.training.document_mask
        self.has_loss = any(s.index == self.num_stages - 1 for s in stages)
        self._schedules: dict[int, Callable[..., object]] = {}

    def train(self, batch: Batch, loss_scale: float) -> Tensor:
        """Forward and backward of this data-parallel rank's share of a step.

        Args:
            batch: microbatches * micro batch rows; tokens are read on the first stage, labels on the last.
            loss_scale: factor of the summed loss of each microbatch.

        Returns:
            Scaled loss summed over the microbatches, [], zero where the last stage is elsewhere. Gradients are left
            in the parameters, summed over data parallel.
        """
        for stage in self.stages:
            stage.module.train()
        if self.num_stages == 1:
            return self._loop(batch, loss_scale)
        losses: list[Tensor] = []
        schedule = self._schedule(self._microbatches(batch))
        if self.recipe.topology.zero >= 2:
            for stage in self.stages:
                begin_microbatch(_fsdp(stage), zero=self.recipe.topology.zero, last=True)
        schedule.step(*self._inputs(batch), **self._keywords(batch, loss_scale, losses), return_outputs=False)
        if self.recipe.topology.zero == 2:
            self._reshard()
        return self._sum(losses)

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss_scale: float) -> Tensor:
        """As `train`, forward only: each microbatch through the stages in order, one behind the other.

        Not by the schedule: torch's V schedules cannot run without their backward passes.
        """
        for stage in self.stages:
            stage.module.eval()
        losses = []
        for part in batch.split(self.recipe.training.micro_batch_size):
            carried = part.tokens
            for stage in self.stages:
                carried = self._receive(stage.index, carried)
                carried = stage.module(carried, part.labels, part.positions, loss_scale)
                self._send(stage.index, carried)
            if self.has_loss:
                losses.append(carried)
        self._reshard()
        return self._sum(losses)

    def _rank_of(self, stage: int) -> int:
        knobs = self.recipe.topology
        return stage_rank(stage, knobs.pp, knobs.schedule)

    def _receive(self, stage: int, carried: Tensor) -> Tensor:
        """The input of a stage: from the rank of the stage before it, or `carried` when that is this one."""
        if stage == 0 or self._rank_of(stage - 1) == self.mesh.coordinates.pp:
            return carried
        carried = torch.empty_like(self.hidden(), device=self.mesh.device)
        dist.recv(carried, group=self.mesh.pp_group, group_src=self._rank_of(stage - 1))
        return carried

    def _send(self, stage: int, carried: Tensor) -> None:
        if stage + 1 < self.num_stages and self._rank_of(stage + 1) != self.mesh.coordinates.pp:
            dist.send(carried, group=self.mesh.pp_group, group_dst=self._rank_of(stage + 1))

    def _loop(self, batch: Batch, loss_scale: float) -> Tensor:
        stage = self.stages[0]
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        parts = batch.split(self.recipe.training.micro_batch_size)
        for part in parts:
            begin_microbatch(_fsdp(stage), zero=self.recipe.topology.zero, last=part is parts[-1])
            loss = stage.module(part.tokens, part.labels, part.positions, loss_scale)
            loss.backward()
            total += loss.detach().squeeze()
        return total

    def _microbatches(self, batch: Batch) -> int:
        return len(batch.tokens) // self.recipe.training.micro_batch_size

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (batch.tokens,) if any(s.index == 0 for s in self.stages) else ()

    def _keywords(self, batch: Batch, loss_scale: float, losses: list[Tensor]) -> dict[str, object]:
        found: dict[str, object] = {} if batch.positions is None else {"positions": batch.positions}
        if self.has_loss:
            found |= {"target": batch.labels, "losses": losses, "labels": batch.labels, "loss_scale": loss_scale}
        return found

    def _sum(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        for loss in losses:
            total += loss.detach().squeeze()
        return total

    def _reshard(self) -> None:
        for stage in self.stages:
            for unit in units(stage.module):
                unit.reshard()

    def _schedule(self, microbatches: int):  # type: ignore[no-untyped-def]
        """The schedule for so many microbatches; made once for each count (a batch ramp-up has several)."""
        if microbatches not in self._schedules:
            kind = get_schedule_class(self.recipe.topology.schedule)
            stages = [self._pipeline_stage(stage) for stage in self.stages]
            first = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
            # The last stage returns its loss, so the schedule has nothing to compute of its own.
            schedule = kind(first, n_microbatches=microbatches, loss_fn=lambda loss, _: loss, scale_grads=False)
            if isinstance(schedule, _PipelineScheduleRuntime):
                actions = schedule.pipeline_order_with_comms
                actions[schedule.rank] = gathered_once(actions[schedule.rank])
            self._schedules[microbatches] = schedule
        return self._schedules[microbatches]

    def hidden(self) -> Tensor:
        """What passes between stages, [s or s/tp, b, h], on the meta device."""
        training, tp = self.recipe.training, self.mesh.tp
        rows = training.seq_len // tp.size if tp.sequence_parallel else training.seq_len
        shape = (rows, training.micro_batch_size, self.recipe.model.hidden_size)
        return torch.empty(shape, dtype=COMPUTE_DTYPE[training.precision], device="meta")

    def _pipeline_stage(self, stage: Stage) -> PipelineStage:
        training = self.recipe.training
        tokens = torch.empty(training.micro_batch_size, training.seq_len, dtype=torch.int64, device="meta")
        hidden = self.hidden().requires_grad_()
        loss = torch.empty(1, device="meta", requires_grad=True)
        first, last = stage.index == 0, stage.index == self.num_stages - 1
        managed = self.recipe.topology.zero < 2
        return PipelineStage(
            stage.module if managed else _Unmanaged(stage.module),
            stage.index,
            self.num_stages,
            self.mesh.device,
            input_args=tokens if first else hidden,
            output_args=loss if last else hidden,
            group=self.mesh.pp_group,
        )


def gathered_once(actions: list[_Action]) -> list[_Action]:
    """A rank's schedule in which each stage's weights are gathered once and let go of once.

    torch keeps three stages gathered at a time: ranks with more would gather some again and again, where ZeRO 1 is to
    keep what it has gathered.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, action in enumerate(actions):
        if action.computation_type is UNSHARD:
            first.setdefault(action.stage_index, i)
        elif action.computation_type is RESHARD:
            last[action.stage_index] = i
    kept = {*first.values(), *last.values()}
    return [a for i, a in enumerate(actions) if a.computation_type not in (UNSHARD, RESHARD) or i in kept]


def _fsdp(stage: Stage) -> FSDPModule:
    assert isinstance(stage.module, FSDPModule)
    return stage.module
