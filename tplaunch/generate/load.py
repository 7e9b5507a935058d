"""A checkpoint's weights in a model, one stage a rank, in the compute dtype, without FSDP2: nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tplaunch.checkpoint.load import load_tensors
from tplaunch.generate.decode import StagedModel
from tplaunch.model.build import outline
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.stages import stage_ranges


def load_model(recipe: Recipe, mesh: Mesh, checkpoint: Path, *, ema: bool = False) -> StagedModel:
    """The model with this rank's stage, filled; every rank calls it.

    Args:
        recipe: with one stage on each pipeline rank.
        ema: with the averages of the weights.

    Raises:
        TplaunchError: the checkpoint is not whole, or would run code.
    """
    ranges, rank = stage_ranges(recipe), mesh.coordinates.pp
    dtype = COMPUTE_DTYPE[recipe.training.precision]
    first, last = rank == 0, rank == len(ranges) - 1
    module, parameters = outline(recipe, mesh, ranges[rank], dtype, first=first, last=last)
    module.to_empty(device=mesh.device)
    if recipe.model.tie_embeddings and first and last:
        assert module.output is not None and module.embedding is not None
        module.output.weight = module.embedding.weight  # `to_empty` has parted them
    wanted: dict[str, Any] = {
        f"model.{kept.name}": (module.get_parameter(name) if kept.trained else module.get_buffer(name)).detach()
        for name, kept in parameters.items()
    }
    load_tensors(wanted, checkpoint, ema=ema)
    return StagedModel(recipe, mesh, {rank: module.eval().requires_grad_(False)}, mesh.pp_group)
