"""A checkpoint's weights in a model, one stage a rank, in the compute dtype, without FSDP2: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tplaunch.checkpoint.load import load_tensors
from tplaunch.checkpoint.store import open_checkpoint
from tplaunch.generate.decode import StagedModel
from tplaunch.huggingface.base import base_of
from tplaunch.huggingface.load import load_weights
from tplaunch.model.build import outline
from tplaunch.parallel.flat import replace_parameter
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.recipe.schema import Finetune, Lora, Recipe
from tplaunch.spec.parameters import Parameter
from tplaunch.spec.stages import stage_ranges

_ALIGN = 64  # elements: every matrix begins on a boundary that vector instructions like


def load_model(recipe: Recipe, mesh: Mesh, checkpoint: Path, *, ema: bool = False) -> StagedModel:
    """The model with this rank's stage, filled; every rank calls it. Adapters stay apart from the frozen weights:
    merged in bf16, much of what they learned would be rounded away.

    Args:
        recipe: with one stage on each pipeline rank.
        ema: with the averages of the weights; of adapters, with theirs.

    Raises:
        TplaunchError: the checkpoint is not whole, or would run code; what its adapters belong to is not there.
    """
    ranges, rank = stage_ranges(recipe), mesh.coordinates.pp
    dtype = COMPUTE_DTYPE[recipe.training.precision]
    about = open_checkpoint(checkpoint).about
    base = base_of(checkpoint, about)
    if base is not None:
        recipe = recipe.model_copy(update={"finetune": Finetune(lora=Lora.model_validate(about["lora"]))})
    module, parameters = outline(recipe, mesh, ranges[rank], dtype, first=rank == 0, last=rank == len(ranges) - 1)
    placed: dict[str, Any] = _place_parameters(module, parameters, mesh.device)
    weights: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    for name, kept in parameters.items():
        if kept.buffer:
            owner, _, attribute = name.rpartition(".")
            placed[name] = torch.empty_like(module.get_buffer(name), device=mesh.device)
            module.get_submodule(owner).register_buffer(attribute, placed[name])
        (adapters if kept.role == "adapter" else weights)[f"model.{kept.name}"] = placed[name]
    load_weights(weights, base or checkpoint, recipe.model, ema=ema and base is None)
    if base is not None:
        load_tensors(adapters, checkpoint, ema=ema)
    return StagedModel(recipe, mesh, {rank: module.eval()}, mesh.pp_group)


def _place_parameters(
    module: nn.Module, parameters: Mapping[str, Parameter], device: torch.device
) -> dict[str, DTensor]:
    """Give the parameters of a stage on the meta device memory: matrices one behind the other, so that those with one
    input are one matrix (`tplaunch.parallel.accumulator.merge`), then adapters, biases and the like.

    Returns:
        The same memory by the parameters' names, as a checkpoint's reader wants it.
    """
    layouts = {name: tensor for name, tensor in module.named_parameters() if isinstance(tensor, DTensor)}
    shapes = {name: layout.to_local().shape for name, layout in layouts.items()}
    names = sorted(layouts, key=lambda name: (len(shapes[name]) < 2, parameters[name].role == "adapter"))
    sizes = [-(-shapes[name].numel() // _ALIGN) * _ALIGN for name in names]
    whole = torch.empty(sum(sizes), dtype=layouts[names[0]].dtype, device=device)
    placed = {}
    for name, memory in zip(names, whole.split(sizes), strict=True):
        layout, local = layouts[name], memory[: shapes[name].numel()].view(shapes[name])
        replace_parameter(module, name, nn.Parameter(local, requires_grad=False))
        placed[name] = DTensor.from_local(
            local, layout.device_mesh, layout.placements, run_check=False, shape=layout.shape, stride=layout.stride()
        )
    return placed
