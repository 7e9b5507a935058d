"""A checkpoint's weights in a model, one stage a rank, in the compute dtype, without FSDP2: nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tplaunch.checkpoint.load import load_tensors
from tplaunch.checkpoint.store import open_checkpoint
from tplaunch.generate.decode import StagedModel
from tplaunch.huggingface.base import base_of
from tplaunch.huggingface.load import load_weights
from tplaunch.model.build import outline
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.recipe.schema import Finetune, Lora, Recipe
from tplaunch.spec.stages import stage_ranges


def load_model(recipe: Recipe, mesh: Mesh, checkpoint: Path) -> StagedModel:
    """The model with this rank's stage, filled; every rank calls it. Adapters stay apart from the frozen weights:
    merged in bf16, much of what they learned would be rounded away.

    Args:
        recipe: with one stage on each pipeline rank.

    Raises:
        TplaunchError: the checkpoint is not whole, or would run code; what its adapters belong to is not there.
    """
    ranges, rank = stage_ranges(recipe), mesh.coordinates.pp
    dtype = COMPUTE_DTYPE[recipe.training.precision]
    first, last = rank == 0, rank == len(ranges) - 1
    about = open_checkpoint(checkpoint).about
    base = base_of(checkpoint, about)
    if base is not None:
        recipe = recipe.model_copy(update={"finetune": Finetune(lora=Lora.model_validate(about["lora"]))})
    module, parameters = outline(recipe, mesh, ranges[rank], dtype, first=first, last=last)
    module.to_empty(device=mesh.device)
    if recipe.model.tie_embeddings and first and last:
        assert module.output is not None and module.embedding is not None
        module.output.weight = module.embedding.weight  # `to_empty` has parted them
    weights: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    for name, kept in parameters.items():
        tensor = (module.get_buffer(name) if kept.buffer else module.get_parameter(name)).detach()
        (adapters if kept.role == "adapter" else weights)[f"model.{kept.name}"] = tensor
    load_weights(weights, base or checkpoint, recipe.model)
    if base is not None:
        load_tensors(adapters, checkpoint)
    return StagedModel(recipe, mesh, {rank: module.eval().requires_grad_(False)}, mesh.pp_group)
