"""Gradients of experts on any ranks: summed over their own data-parallel ranks alone, each number counted once.

A stand-in for a block, whose gradients are told: what each rank adds to a parameter is drawn from its number, so that
a sum over other ranks, or too many, or too few, is another number (Megatron-LM issue 7452, PR 5916 and PR 6099;
DeepSpeed PR 5259).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.recipes import case, ranks, resolved
from tests.world import World

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tplaunch.parallel.mesh import Mesh
    from tplaunch.spec.parameters import Parameter

MODEL = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_heads": 4,
    "num_kv_heads": 4,
    "ffn_hidden_size": 16,
    "linear_bias": True,
    "moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": 8, "shared_ffn_hidden_size": 16, "biases": True},
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2-etp2": {"tp": 2, "expert_tp": 2},
    "tp2-ep2": {"tp": 2, "ep": 2},
    "dp2-ep2": {"dp": 2, "ep": 2},
    "dp2-etp2": {"dp": 2, "expert_tp": 2},  # expert_tp > tp, ep 1
    "tp4-etp2": {"tp": 4, "expert_tp": 2},  # tp > expert_tp, ep 1
    "tp4-sp-ep2-etp2": {"tp": 4, "ep": 2, "expert_tp": 2, "sequence_parallel": True},
    "tp2-dp4-ep2": {"tp": 2, "dp": 4, "ep": 2},
    "tp2-dp4-ep4-etp2": {"tp": 2, "dp": 4, "ep": 4, "expert_tp": 2},
    "tp2-cp2-dp2-ep2": {"tp": 2, "cp": 2, "dp": 2, "ep": 2},
    "tp2-cp2-dp2-sp-ep4": {"tp": 2, "cp": 2, "dp": 2, "ep": 4, "sequence_parallel": True},
    "tp2-dp4-hsdp-ep2": {"tp": 2, "dp": 4, "ep": 2, "dp_replicate": 2},
    "dp8-hsdp-etp2": {"dp": 8, "expert_tp": 2, "dp_replicate": 2},
    "dp6-ep2": {"dp": 6, "ep": 2},  # three parts of rows that three does not divide
}


def raw_of(layout: dict[str, Any], zero: int) -> dict[str, Any]:
    return case(zero=zero, model=MODEL, training={"micro_batch_size": 1, "global_batch_size": 24}, **layout)


def is_whole(parameter: Parameter, mesh: Mesh) -> bool:
    """Whether tp ranks compute the same gradient of a parameter."""
    replicated = parameter.tp_dim is None and not parameter.expert and ".router." not in parameter.name
    return replicated and not mesh.tp.sequence_parallel


def told(parameter: Parameter, mesh: Mesh, rank: int) -> torch.Tensor:
    """What a rank adds to the gradient of its slice of a parameter, fp64."""
    import torch

    at = mesh.topology.coordinates(rank)
    if is_whole(parameter, mesh):
        rank -= at.tp
    generator = torch.Generator().manual_seed(zlib.crc32(f"{parameter.name} {rank}".encode()))
    return torch.randn(mesh.local_shape(parameter), dtype=torch.float64, generator=generator)


def stand_in(parameters: dict[str, Parameter], mesh: Mesh) -> nn.Module:
    """A module with the parameters, whose output has the gradients that are told."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.tensor import Replicate, Shard

    from tplaunch.parallel.linear import local, parameter

    class Part(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.names: dict[str, str] = {}
            self.prefix = prefix

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for attribute, name in self.names.items():
                weight = local(self.get_parameter(attribute))
                x = x + (weight * told(parameters[name], mesh, dist.get_rank()).to(weight.dtype)).sum()
            for child in self.children():
                x = child(x)
            return x

    root = Part("")
    for name, kept in parameters.items():
        owner: nn.Module = root
        for key in name.split(".")[:-1]:
            if key not in dict(owner.named_children()):
                owner.add_module(key, Part(key))
            owner = owner.get_submodule(key)
        assert isinstance(owner, Part)
        attribute = name.split(".")[-1]
        if kept.expert:
            assert mesh.experts is not None
            cut = Replicate() if kept.expert_tp_dim is None else Shard(kept.expert_tp_dim)
            made = parameter(kept.shape, mesh.experts.parameters, (Shard(0), cut))
        else:
            made = parameter(kept.shape, mesh.tp.mesh, (Replicate() if kept.tp_dim is None else Shard(kept.tp_dim),))
        owner.register_parameter(attribute, made)
        owner.names[attribute] = name
    return root


def measure(raw: dict[str, Any]) -> tuple[float, float, int]:
    """The largest error of a gradient, the error of the norm's square, and how many numbers the world counts."""
    import torch
    import torch.distributed as dist

    from tplaunch.model.build import Stage, default_dtype
    from tplaunch.optim.gradients import GradientFinalizer
    from tplaunch.parallel.flat import FlatSharding
    from tplaunch.parallel.fsdp import FsdpSharding, shard
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.spec.parameters import block_parameters
    from tplaunch.torch_private import with_local

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    kept = {p.name: p for layer in range(2) for p in block_parameters(recipe.model, layer) if p.trained}
    with torch.device("meta"), default_dtype(torch.float64):
        module = stand_in(kept, mesh)
    sharding: Any
    if recipe.topology.zero <= 1:
        sharding = FlatSharding(module, kept, mesh, precision="fp64", in_place=False, overlap=True, compiled=False)
    else:
        assert mesh.experts is not None
        module.to_empty(device="cpu")
        for block in module.get_submodule("layers").children():
            shard(block.get_submodule("moe.experts"), mesh.experts.data, zero=recipe.topology.zero, precision="fp64")
            shard(block, mesh.ranks.mesh, zero=recipe.topology.zero, precision="fp64")
        shard(module, mesh.ranks.mesh, zero=recipe.topology.zero, precision="fp64", root=True)
        sharding = FsdpSharding(module, kept, zero=recipe.topology.zero)
    module.tied_copy = False  # type: ignore[assignment]
    finalizer = GradientFinalizer(
        [Stage(0, module, sharding, kept)],  # type: ignore[arg-type]
        mesh,
        schedule="1f1b",
        num_stages=1,
        tied=False,
    )
    sharding.begin_step(2)
    for last in (False, True):  # two microbatches
        sharding.begin_microbatch(last=last)
        module(torch.zeros((), dtype=torch.float64, requires_grad=True)).backward()
        if recipe.topology.zero <= 1:
            for layer in (1, 0):
                sharding.block_done(f"layers.{layer}")
    finalizer.complete()
    worst = squares = 0.0
    for held in sharding.shards:
        parameter = held.parameter
        whole = torch.zeros(parameter.shape, dtype=torch.float64)
        for rank in range(mesh.topology.world_size):
            at, expert = mesh.topology.coordinates(rank), mesh.topology.expert_coordinates(rank)
            shape = mesh.local_shape(parameter)
            starts = [0] * len(shape)
            if parameter.tp_dim is not None:
                starts[parameter.tp_dim] = at.tp * shape[parameter.tp_dim]
            if parameter.expert:
                starts[0] = expert.ep * shape[0]
                if parameter.expert_tp_dim is not None:
                    starts[1] = expert.expert_tp * shape[1]
            elif at.tp and is_whole(parameter, mesh):
                continue
            where = tuple(slice(a, a + n) for a, n in zip(starts, shape, strict=True))
            whole[where] += 2 * told(parameter, mesh, rank)
        ours = with_local(held.layout.detach(), sharding.gradient(held)).full_tensor()
        worst = max(worst, float((ours - whole).abs().max()))
        squares += float(whole.square().sum())
    totals = torch.stack(
        [finalizer.square_sum(), torch.tensor(sum(h.gradient.numel() for h in finalizer.owned)).double()]
    )
    dist.all_reduce(totals)
    return worst, abs(float(totals[0]) / squares - 1), int(totals[1])


def cases() -> Iterator[Any]:
    for name, layout in LAYOUTS.items():
        for zero in range(1 if "dp_replicate" in layout else 0, 4):  # ZeRO 0 replicates all the way
            yield pytest.param(name, zero, marks=[] if zero in (1, 3) else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "zero"), list(cases()))
def test_every_number_is_summed_over_its_own_ranks_and_counted_once(world: World, name: str, zero: int) -> None:
    from tplaunch.spec.parameters import block_parameters

    raw = raw_of(LAYOUTS[name], zero)
    model = resolved(raw).model
    numbers = sum(p.count for layer in range(2) for p in block_parameters(model, layer) if p.trained)
    for worst, norm, counted in world.run(ranks(raw), measure, raw):
        assert worst < 1e-12
        assert norm < 1e-12
        assert counted == numbers
