"""Microbatches through this rank's stages: a plain loop. With more than one stage, `train.schedule` runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from tplaunch.model.build import Stage
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.parallel.relay import Relay
from tplaunch.recipe.schema import Recipe
from tplaunch.train.batch import Batch


class Pipeline:
    """Runs batches through the stages; on its own, one stage that is the whole model.

    Args:
        stages: this rank's stages.
        mesh: the mesh.
        recipe: the recipe.
    """

    def __init__(self, stages: list[Stage], mesh: Mesh, recipe: Recipe) -> None:
        self.stages = stages
        self.mesh = mesh
        self.recipe = recipe
        self.group = mesh.pp_group
        self.num_stages = recipe.topology.pp * recipe.topology.virtual_stages
        ends = any(s.index in (0, self.num_stages - 1) for s in stages)
        self.reads_data = ends or recipe.training.document_mask
        self.has_loss = any(s.index == self.num_stages - 1 for s in stages)

    def train(self, batch: Batch, loss_scale: float) -> Tensor:
        """Forward and backward of this data-parallel rank's share of a step.

        Args:
            batch: microbatches * micro batch rows, whole; tokens are read on the first stage, labels on the last.
            loss_scale: factor of the summed loss of each microbatch.

        Returns:
            Scaled loss summed over the microbatches, [], zero where the last stage is elsewhere. Gradients are left
            in the parameters, summed over data parallel.
        """
        self.set_training(True)
        (stage,) = self.stages
        losses = []
        parts = self.microbatches(batch)
        stage.sharding.begin_step(len(parts))
        for part in parts:
            stage.sharding.begin_microbatch(last=part is parts[-1])
            loss = stage.module(part.tokens, part.labels, part.positions, loss_scale)
            loss.backward()
            losses.append(loss.detach())
        return self.sum_losses(losses)

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss_scale: float) -> Tensor:
        """As `train`, forward only: each microbatch through the stages in order, one behind the other.

        Not by the schedule, whose order is that of forward and backward passes.
        """
        self.set_training(False)
        losses = []
        relay, like = Relay(self.recipe, self.mesh, self.group), hidden_states(self.recipe, self.mesh)
        for part in self.microbatches(batch):
            carried = part.tokens
            for stage in self.stages:
                carried = relay.receive(stage.index, carried, like.shape, like.dtype)
                carried = stage.module(carried, part.labels, part.positions, loss_scale)
                relay.send(stage.index, carried)
            if self.has_loss:
                losses.append(carried)
        self.reshard()
        return self.sum_losses(losses)

    def limit(self, timeout_s: float) -> None:
        """Let sends and receives between stages wait so long from now on; every rank must call it."""
        if self.num_stages > 1 and self.mesh.device.type == "cpu":  # NCCL's follow `set_group_timeouts`
            self.group = self.mesh.new_pp_group(timeout_s)

    def microbatches(self, batch: Batch) -> list[Batch]:
        """The microbatches of a share, and of each the part that this rank computes."""
        parts, cp = batch.split(self.recipe.training.micro_batch_size), self.mesh.cp
        return parts if cp is None else [part.cut(cp) for part in parts]

    def set_training(self, training: bool) -> None:
        """Put the stages into training or evaluation mode."""
        for stage in self.stages:
            stage.module.train(training)

    def sum_losses(self, losses: list[Tensor]) -> Tensor:
        """The sum of microbatches' losses, fp64 []."""
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        for loss in losses:
            total += loss.detach().squeeze()
        return total

    def reshard(self) -> None:
        """Let go of the weights that the stages have gathered."""
        for stage in self.stages:
            stage.sharding.release()


def hidden_states(recipe: Recipe, mesh: Mesh) -> Tensor:
    """What passes between stages, [s/cp or s/(cp tp), b, h], on the meta device."""
    training, tp = recipe.training, mesh.tp
    rows = training.seq_len // mesh.topology.cp
    if tp.sequence_parallel:
        rows //= tp.size
    shape = (rows, training.micro_batch_size, recipe.model.hidden_size)
    return torch.empty(shape, dtype=COMPUTE_DTYPE[training.precision], device="meta")
