"""From a recipe to this rank's pipeline stages: outlined on the meta device, placed and sharded, then filled, each rank
only with what it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tplaunch.model.init import Slice, initialize
from tplaunch.model.transformer import TransformerStage
from tplaunch.parallel.flat import FlatSharding
from tplaunch.parallel.fsdp import FsdpSharding, shard
from tplaunch.parallel.layers import ColumnParallelLinear, RowParallelLinear
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE, STORAGE_DTYPE, gradient_dtype
from tplaunch.parallel.shard import Sharding
from tplaunch.recipe.schema import Lora, Recipe
from tplaunch.spec.gradients import are_added_in_place, are_flat, backward_is_whole
from tplaunch.spec.lora import adapted, is_target
from tplaunch.spec.parameters import Parameter, stage_parameters
from tplaunch.spec.schedules import stages_of
from tplaunch.spec.stages import stage_ranges


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on this rank.

    Args:
        index: its number among all stages.
        module: the stage.
        sharding: how data parallelism holds it.
        parameters: what it holds, by the name that `module` gives each; a tied copy's `Parameter` is the
            embedding's, whose name it has in checkpoints. Buffers are among them.
    """

    index: int
    module: TransformerStage
    sharding: Sharding
    parameters: dict[str, Parameter]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What is kept with the weights and not trained, the same on all ranks that hold the layer, by its name."""
        return {name: self.module.get_buffer(name) for name, kept in self.parameters.items() if kept.buffer}

    @property
    def frozen(self) -> bool:
        """Whether all but adapters stays as it is."""
        return any(parameter.frozen for parameter in self.parameters.values())


def build_stages(recipe: Recipe, mesh: Mesh, *, draw: bool = True) -> list[Stage]:
    """Build this rank's stages, sharded.

    Args:
        draw: fill them with initial weights; without, all but adapters hold none, for a checkpoint to be read into.
    """
    parallelism = recipe.topology
    ranges = stage_ranges(recipe)
    mine = stages_of(mesh.coordinates.pp, parallelism.pp, parallelism.virtual_stages, parallelism.schedule)
    stages = [_build(recipe, mesh, i, ranges[i], first=i == 0, last=i == len(ranges) - 1) for i in mine]
    parts = [part for stage in stages for part in _slices(stage, mesh) if draw or part.parameter.role == "adapter"]
    if parts:
        initialize(parts, recipe.model, recipe.training.seed)
        for stage in stages:
            stage.sharding.publish()
    return stages


def _slices(stage: Stage, mesh: Mesh) -> Iterator[Slice]:
    """What this rank keeps of each parameter: of its slice, its data-parallel part of rows."""
    for kept in stage.sharding.shards:
        begins, ranks = mesh.slice_of(kept.parameter), mesh.data_ranks(kept.parameter)
        rows = mesh.local_shape(kept.parameter)[0]
        first = min(ranks.part * -(-rows // ranks.parts), rows)  # rows are cut into equal parts, rounded up
        if len(kept.weight) == rows:  # a frozen weight is not cut in flat buffers
            first = 0
        yield Slice(kept.weight, kept.parameter, (begins[0] + first, *begins[1:]))


def outline(
    recipe: Recipe, mesh: Mesh, layers: range, dtype: torch.dtype, *, first: bool, last: bool
) -> tuple[TransformerStage, dict[str, Parameter]]:
    """A stage on the meta device, and what it holds (see `Stage.parameters`).

    Args:
        dtype: of what is trained. Frozen weights are kept in the compute dtype alone.
    """
    model, lora = recipe.model, recipe.lora
    with torch.device("meta"), default_dtype(dtype if lora is None else COMPUTE_DTYPE[recipe.training.precision]):
        module = TransformerStage(model, recipe.training, layers, first=first, last=last, mesh=mesh)
    parameters = {p.name: p for p in adapted(stage_parameters(model, layers, first=first, last=last), lora)}
    if lora is not None:
        module.requires_grad_(False)
        with torch.device("meta"), default_dtype(dtype):
            _add_adapters(module, parameters.values(), lora)
    if module.tied_copy:
        parameters["output.weight"] = parameters.pop("embedding.weight")
    held = {*dict(module.named_parameters()), *(name for name, _ in module.named_buffers() if name in parameters)}
    assert parameters.keys() == held, "spec.parameters and model.block disagree"
    return module, parameters


def _add_adapters(module: TransformerStage, parameters: Iterable[Parameter], lora: Lora) -> None:
    """Add the adapters of a stage, uninitialised."""
    for parameter in parameters:
        if is_target(lora, parameter):
            layer = module.get_submodule(parameter.name.removesuffix(".weight"))
            assert isinstance(layer, ColumnParallelLinear | RowParallelLinear)
            layer.add_adapter(lora.rank, lora.alpha / lora.rank)


def _build(recipe: Recipe, mesh: Mesh, index: int, layers: range, *, first: bool, last: bool) -> Stage:
    training, layout = recipe.training, recipe.topology
    module, parameters = outline(recipe, mesh, layers, STORAGE_DTYPE[training.precision], first=first, last=last)
    if training.compile:
        module.compile_blocks()
    sharding: Sharding
    if not are_flat(layout):
        sharding = _under_fsdp(recipe, mesh, module, parameters)
    else:
        sharding = flat = FlatSharding(
            module,
            parameters,
            mesh,
            precision=training.precision,
            gradient=gradient_dtype(recipe),
            in_place=are_added_in_place(recipe),
            overlap=backward_is_whole(layout),
            compiled=training.compile,
        )
        module.block_begins = flat.block_begins
        if flat.overlaps:
            module.block_done = flat.block_done
    for name, parameter in parameters.items():
        if parameter.buffer:
            owner, _, attribute = name.rpartition(".")
            buffer = torch.zeros(parameter.shape, dtype=torch.float32, device=mesh.device)
            module.get_submodule(owner).register_buffer(attribute, buffer)
    module.place_rope(training.seq_len, mesh.device)
    return Stage(index, module, sharding, parameters)


def _under_fsdp(recipe: Recipe, mesh: Mesh, module: TransformerStage, parameters: dict[str, Parameter]) -> FsdpSharding:
    """Place a stage block by block and put it under FSDP2: no rank holds more than one whole block at a time."""
    zero, precision, reduce = recipe.topology.zero, recipe.training.precision, gradient_dtype(recipe)
    for number, block in module.layers.items():
        block.to_empty(device=mesh.device)
        if recipe.model.has_experts(int(number)):  # a unit of their own, over their own data-parallel ranks
            assert mesh.experts is not None
            shard(block.get_submodule("moe.experts"), mesh.experts.data, zero=zero, precision=precision, reduce=reduce)
        shard(block, mesh.ranks.mesh, zero=zero, precision=precision, reduce=reduce, within="moe.experts")
    tied_here = recipe.model.tie_embeddings and module.embedding is not None and module.output is not None
    for name, part in module.named_children():
        if name != "layers" and not (tied_here and name == "output"):
            part.to_empty(device=mesh.device)
    if tied_here:
        assert module.output is not None and module.embedding is not None
        module.output.weight = module.embedding.weight
    also = ("extend", "score")
    shard(module, mesh.ranks.mesh, zero=zero, precision=precision, reduce=reduce, root=True, also=also)
    return FsdpSharding(module, parameters, zero=zero)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of this dtype within a `with` block, where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
