"""One optimizer step of one rank: microbatches through the pipeline, gradients, clipping, the update.

What `train`, `bench` and `simulate` all run: it knows no run directory, no checkpoint and no log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.checkpoint.state import TrainingProgress
from tplaunch.model.build import Stage, build_stages
from tplaunch.optim.averages import Averages
from tplaunch.optim.gradients import GradientFinalizer
from tplaunch.optim.loss_scale import LossScale
from tplaunch.optim.optimizer import ShardedOptimizer
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.attention import attended_positions
from tplaunch.spec.course import Course
from tplaunch.spec.flops import model_flops_per_token
from tplaunch.train.balance import Balance
from tplaunch.train.batch import Batch, masks_targets
from tplaunch.train.pipeline import Pipeline
from tplaunch.train.schedule import ScheduledPipeline


def make_pipeline(stages: list[Stage], mesh: Mesh, recipe: Recipe) -> Pipeline:
    """The pipeline of a recipe."""
    kind = Pipeline if recipe.topology.pp == 1 else ScheduledPipeline
    return kind(stages, mesh, recipe)


@dataclass(frozen=True)
class StepResult:
    """What the whole world saw of one step; equal on every rank.

    Args:
        loss: mean over the targets of the global batch.
        grad_norm: of all gradients, before clipping.
        finite: whether both are; if not, the update was skipped.
        stop: whether a rank was asked to stop.
    """

    loss: float
    grad_norm: float
    finite: bool
    stop: bool

    @classmethod
    def of(cls, totals: Sequence[float]) -> StepResult:
        """From the sums over the world of loss, square of the norm, and wishes to stop."""
        loss, squares, stops = totals
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        return cls(loss, norm, math.isfinite(loss) and math.isfinite(norm), stops > 0)


class Told:
    """Numbers on their way to the host: work that is given to the device after them does not delay them.

    Args:
        numbers: [n].
    """

    def __init__(self, numbers: Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._there = torch.cuda.Event() if numbers.is_cuda else None
        if self._there is not None:
            self._there.record()

    def wait(self) -> list[float]:
        """The numbers."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


class TrainStep:
    """This rank's model, gradients and optimizer, and the step over them.

    Args:
        recipe: resolved.
        mesh: the device mesh.
        mark: told (step, part of the step) as the rank enters it (`Heartbeat.mark`).
        stop_requested: whether this process was asked to stop; asked once a step.
        draw: fill the model with initial weights (`build_stages`).
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        mark: Callable[[int, str], None] = lambda step, part: None,
        stop_requested: Callable[[], bool] = lambda: False,
        *,
        draw: bool = True,
    ) -> None:
        self.recipe = recipe
        self.course = Course(recipe)
        self.mesh = mesh
        self.mark = mark
        self.stop_requested = stop_requested
        self.stages = build_stages(recipe, mesh, draw=draw)
        self.pipeline = make_pipeline(self.stages, mesh, recipe)
        self.balance = Balance(self.stages, mesh, recipe, self.course)
        self.optimizer = ShardedOptimizer(self.stages, recipe, mesh)
        ema = recipe.training.ema
        self.averages = Averages(self.optimizer, ema) if ema is not None else None
        self.gradients = GradientFinalizer(
            self.stages,
            mesh,
            schedule=recipe.topology.schedule,
            num_stages=self.pipeline.num_stages,
            tied=recipe.model.tie_embeddings,
        )
        self.loss_scale = LossScale.for_precision(recipe.training.precision)
        self.progress = TrainingProgress()
        self.flops_per_token = model_flops_per_token(recipe.model, attended_positions(recipe), recipe.lora)

    def run(self, batch: Batch, loss_factor: float = 1.0) -> StepResult:
        """Train on this data-parallel rank's share of the global batch.

        Args:
            batch: the share.
            loss_factor: 1, or NaN to spoil this rank's loss (`FaultInjector.at_step`).
        """
        progress = self.progress
        step = progress.step + 1
        batch = batch.to(self.mesh.device)
        tokens = self.tokens_of(step)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        self.balance.begin_step(step, scale)
        self.mark(step, "forward and backward")
        loss = self.pipeline.train(batch, loss_factor * scale / self.count_targets(batch, tokens))
        self.mark(step, "gradients")
        self.gradients.complete()
        totals = self._all_reduce_totals(loss / scale, self.gradients.square_sum() / scale**2)
        told = Told(totals)
        self.mark(step, "update")
        if self.optimizer.scales:
            self._update_unread(totals, scale)
            result = StepResult.of(told.wait())
        else:
            result = StepResult.of(told.wait())
            self._update_read(result, scale)
        if result.finite:
            self.balance.update()
            progress.updates, progress.nonfinite = progress.updates + 1, 0
            if self.averages is not None:
                self.averages.after(step)
                progress.averaged = self.averages.count
        else:
            progress.nonfinite, progress.skipped = progress.nonfinite + 1, progress.skipped + 1
        if self.loss_scale is not None:
            self.loss_scale.update(result.finite)
        self.optimizer.zero_grad()
        progress.step = step
        progress.samples += self.course.batch_size(step)
        progress.tokens += tokens
        progress.flops += tokens * self.flops_per_token
        return result

    def tokens_of(self, step: int) -> int:
        """Tokens of the global batch of a step."""
        return self.course.tokens_of(step)

    def count_targets(self, batch: Batch, tokens: int) -> int:
        """Targets of the global batch that count, of `tokens`; right where the loss is."""
        if not masks_targets(self.recipe):
            return tokens
        total = (batch.labels != IGNORE).sum()
        if self.mesh.coordinates.cp:  # the ranks that share these rows count them once
            total.zero_()
        for axis in ("dp_replicate", "dp_shard"):
            dist.all_reduce(total, group=self.mesh.world.get_group(axis))
        return max(1, int(total))

    def _all_reduce_totals(self, loss: Tensor, squares: Tensor) -> Tensor:
        """Sum loss, square of the gradients' norm and wishes to stop over the world, in one all-reduce, so that all
        decide alike: fp64 [3]."""
        counts = self.pipeline.has_loss and self.mesh.tp.rank == 0
        stop = float(self.stop_requested())
        totals = torch.stack(
            [
                loss.detach().double().sum() if counts else squares.new_zeros(()),
                squares,
                torch.full_like(squares, stop),  # a kernel's argument: no copy from the host's memory
            ]
        )
        dist.all_reduce(totals)
        return totals

    def _update_unread(self, totals: Tensor, scale: float) -> None:
        """Update before the host has read what the step gave: the device decides whether and how far to clip. So the
        update is at work while the host learns of it, and begins the next step."""
        loss, squares, _ = totals.unbind()
        norm, clip = squares.sqrt(), self.recipe.training.grad_clip
        divisor = scale if clip is None else ((norm + 1e-6) / clip).where(norm > clip, 1.0) * scale
        finite = (loss + norm).isfinite()
        self._step(divisor, finite)

    def _update_read(self, result: StepResult, scale: float) -> None:
        """Update by an optimizer that scales no gradients itself."""
        clip, factor = self.recipe.training.grad_clip, 1.0 / scale
        if not result.finite:
            return
        if clip is not None and result.grad_norm > clip:
            factor *= clip / (result.grad_norm + 1e-6)
        if factor != 1.0:
            self.gradients.scale(factor)
        self._step()

    def _step(self, divisor: Tensor | float = 1.0, finite: Tensor | None = None) -> None:
        step = self.progress.step + 1
        self.optimizer.step(self.course.lr(step), divisor, finite, decay=self.course.decay_factor(step))
