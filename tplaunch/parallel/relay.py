"""What one pipeline stage gives, handed to the rank of the next: one stage at work at a time, by no schedule."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.schedules import stage_rank


class Relay:
    """Sends and receives of this rank; each rank goes through its stages in order.

    Args:
        recipe: places the stages on the ranks.
        mesh: the mesh.
        group: of the pipeline's ranks.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, group: dist.ProcessGroup) -> None:
        layout = recipe.topology
        stages = range(layout.pp * layout.virtual_stages)
        self.ranks = [stage_rank(stage, layout.pp, layout.schedule) for stage in stages]  # that hold them
        self.mesh, self.group = mesh, group

    def receive(self, stage: int, carried: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The input of a stage: from the rank of the stage before it, or `carried` when that is this one."""
        if stage == 0 or self.ranks[stage - 1] == self.mesh.coordinates.pp:
            return carried
        carried = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        dist.recv(carried, group=self.group, group_src=self.ranks[stage - 1])
        return carried

    def send(self, stage: int, carried: Tensor) -> None:
        """The output of a stage, to the rank of the stage after it, if there is one and it is another."""
        if stage + 1 < len(self.ranks) and self.ranks[stage + 1] != self.mesh.coordinates.pp:
            dist.send(carried.contiguous(), group=self.group, group_dst=self.ranks[stage + 1])
