"""The device mesh: torch's view of the topology."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tplaunch.machine import SHARE_GPUS, shares_gpus
from tplaunch.recipe.schema import ContextKind, Recipe
from tplaunch.spec import slices
from tplaunch.spec.context import pieces
from tplaunch.spec.parameters import Parameter
from tplaunch.spec.topology import Coordinates, Topology
from tplaunch.torch_private import unflatten


@dataclass(frozen=True)
class Ranks:
    """The ranks along one axis of the mesh.

    Args:
        mesh: 1-D mesh of them.
    """

    mesh: DeviceMesh

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()


@dataclass(frozen=True)
class TensorParallel(Ranks):
    """What a tensor-parallel layer needs to know of its group.

    Args:
        mesh: 1-D mesh of the tp ranks; parameters are DTensors on it.
        sequence_parallel: activations between the layers are split along the sequence
            (Korthikanti et al. 2022, arXiv 2205.05198).
        fused: matmuls and the all-gathers before them, or reduce-scatters after them, run as one operation, piece by
            piece (asynchronous tensor parallelism: torch's symmetric-memory operations; torchtitan
            `enable_async_tensor_parallel`).
    """

    sequence_parallel: bool = False
    fused: bool = False


@dataclass(frozen=True)
class ContextParallel(Ranks):
    """The ranks that share each sequence.

    Args:
        mesh: 1-D mesh of the cp ranks.
        kind: what they exchange for attention (`tplaunch.parallel.context`).
    """

    kind: ContextKind

    def pieces(self, seq_len: int, rank: int | None = None) -> list[range]:
        """The places in a sequence of what a rank holds, by default this one."""
        return pieces(self.kind, self.size, self.rank if rank is None else rank, seq_len)

    def cut(self, rows: Tensor) -> Tensor:
        """This rank's pieces, one after the other, of what there is of each token of whole sequences: [n, s] ->
        [n, s/cp]."""
        return torch.cat([rows[:, piece.start : piece.stop] for piece in self.pieces(rows.shape[1])], 1)


class DataRanks:
    """The ranks that hold the same slice of some parameters: full copies of it, each cut into parts.

    Args:
        world: the world, with the axes `<name>_replicate`, of the copies, and `<name>_shard`, of the parts of one.
        name: "dp", or "edp" of the experts' parameters.
    """

    def __init__(self, world: DeviceMesh, name: str) -> None:
        self._world = world
        self._axes = f"{name}_replicate", f"{name}_shard"
        self.copies, self.parts = (world[axis].size() for axis in self._axes)
        self.copy, self.part = (world.get_local_rank(axis) for axis in self._axes)

    @property
    def mesh(self) -> DeviceMesh:
        """What FSDP2 shards over: 1-D, or (replicate, shard) for HSDP."""
        return self._world[self._axes] if self.copies > 1 else self.shard

    @property
    def shard(self) -> DeviceMesh:
        """The 1-D mesh of the parts of this rank's copy."""
        return self._world[self._axes[1]]

    @property
    def shard_group(self) -> dist.ProcessGroup:
        return self._world.get_group(self._axes[1])

    @property
    def replicate_group(self) -> dist.ProcessGroup:
        return self._world.get_group(self._axes[0])


class ExpertParallel:
    """Where the experts of this rank's pipeline stage lie: its ranks as (edp, ep, expert_tp), expert_tp fastest
    (Megatron-LM's parallel folding, arXiv 2504.14960).

    Args:
        topology: sizes of the axes.
        device: this rank's device.
        replicate: how many full copies the edp ranks hold: divides edp.

    Attributes:
        world: the world as (pp, edp_replicate, edp_shard, ep, expert_tp).
        ep: the ranks that share the experts.
        tp: the ranks that share each expert.
        parameters: the 2-D mesh (ep, expert_tp), on which experts' DTensors lie.
        ranks: the edp ranks.
        stage: all ranks of the stage, in rank order.
    """

    def __init__(self, topology: Topology, *, device: torch.device, replicate: int) -> None:
        shape = (topology.pp, replicate, topology.edp // replicate, topology.ep, topology.expert_tp)
        names = ("pp", "edp_replicate", "edp_shard", "ep", "expert_tp")
        self.world = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.ep, self.tp = Ranks(self.world["ep"]), Ranks(self.world["expert_tp"])
        self.parameters = self.world["ep", "expert_tp"]
        self.ranks = DataRanks(self.world, "edp")
        size = topology.stage_size
        self.stage = _group_of(range(first, first + size) for first in range(0, topology.world_size, size))

    @property
    def data(self) -> DeviceMesh:
        """The mesh that FSDP2 shards experts over: 1-D, or (replicate, shard) for HSDP."""
        return self.ranks.mesh


def _group_of(groups: Iterable[Iterable[int]], timeout_s: float | None = None) -> dist.ProcessGroup:
    """Make groups that cover the world once; returns this rank's. Every rank must call it."""
    mine: dist.ProcessGroup | None = None
    for ranks in map(list, groups):
        group = dist.new_group(ranks, timeout=None if timeout_s is None else timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


class Mesh:
    """The world as (pp, dp_replicate, dp_shard, tp), tp fastest: Megatron's rank order.

    Ranks that share a sequence hold the same weights, as those do that read other samples: dp_replicate x dp_shard is
    dp x cp, cp fastest, and whatever is reduced, sharded or counted over them is so over both.

    Args:
        topology: sizes of the axes.
        dp_replicate: how many full copies the dp x cp ranks hold: divides dp (HSDP), or is dp * cp.
        cp_kind: see `ContextParallel`.
        sequence_parallel: see `TensorParallel`.
        async_tp: fuse what `TensorParallel` names, where sequence parallelism and the device allow it.
        device: this rank's device.
        expert_replicate: see `ExpertParallel`; None: the model has no experts.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        device: torch.device,
        dp_replicate: int = 1,
        cp_kind: ContextKind = "allgather",
        sequence_parallel: bool = False,
        async_tp: bool = False,
        expert_replicate: int | None = None,
    ) -> None:
        self.topology = topology
        self.device = device
        self.dp_replicate = dp_replicate
        shape = (topology.pp, dp_replicate, topology.dp * topology.cp // dp_replicate, topology.tp)
        self.world = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
        sequence_parallel = sequence_parallel and topology.tp > 1
        one_node = topology.ranks_per_node % topology.tp == 0
        fused = async_tp and sequence_parallel and one_node and has_fused_matmuls(device)
        self.tp = TensorParallel(self.world["tp"], sequence_parallel, fused)
        self.cp = self._context_parallel(cp_kind) if topology.cp > 1 else None
        self.coordinates: Coordinates = topology.coordinates(dist.get_rank())
        self._key_value: dict[int, DeviceMesh] = {}
        self.ranks = DataRanks(self.world, "dp")
        self.experts: ExpertParallel | None = None
        if expert_replicate is not None:
            self.experts = ExpertParallel(topology, device=device, replicate=expert_replicate)

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> Mesh:
        """The mesh of a resolved recipe. ZeRO 0 is replication all the way: every dp and cp rank holds a full copy."""
        topology, parallelism = Topology.of(recipe), recipe.topology
        expert_replicate = topology.edp if parallelism.zero == 0 else parallelism.dp_replicate
        return cls(
            topology,
            device=device,
            dp_replicate=topology.dp * topology.cp if parallelism.zero == 0 else parallelism.dp_replicate,
            cp_kind=parallelism.cp_kind,
            sequence_parallel=parallelism.sequence_parallel,
            async_tp=parallelism.async_tp,
            expert_replicate=None if recipe.model.moe is None else expert_replicate,
        )

    def _context_parallel(self, kind: ContextKind) -> ContextParallel:
        """The fastest part of the axis that holds whole sequences."""
        cp = self.topology.cp
        axis = self.world["dp_shard" if self.world["dp_shard"].size() > 1 else "dp_replicate"]
        return ContextParallel(unflatten(axis, (axis.size() // cp, cp), ("sequence", "cp"))["cp"], kind)

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.world["pp"].get_group()

    def new_pp_group(self, timeout_s: float) -> dist.ProcessGroup:
        """Another group of this rank's pipeline, whose sends and receives wait so long; every rank must call it.

        gloo's keep the timeout that their group was made with, whatever is set later: by default 30 minutes.
        """
        return _group_of(self.topology.groups("pp"), timeout_s)

    def stage_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's pipeline stage, in rank order; every rank must call it."""
        if self.experts is not None:
            return self.experts.stage
        world, size = self.topology.world_size, self.topology.stage_size
        if world == size and dist.group.WORLD is not None:
            return dist.group.WORLD
        return _group_of(range(first, first + size) for first in range(0, world, size))

    def data_ranks(self, parameter: Parameter) -> DataRanks:
        """The ranks that hold the same slice of a parameter, and share the work of updating it."""
        if not parameter.expert:
            return self.ranks
        assert self.experts is not None
        return self.experts.ranks

    def local_shape(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape of a rank's slice of a parameter, before data parallelism cuts it."""
        return slices.local_shape(parameter, self.topology)

    def slice_of(self, parameter: Parameter) -> tuple[int, ...]:
        """Where this rank's slice of a parameter begins in the whole, by dim."""
        return slices.slice_of(parameter, self.topology, dist.get_rank())

    def key_value(self, num_kv_heads: int) -> DeviceMesh:
        """The tp ranks as (heads, copies), for key/value projections with fewer heads than tp ranks."""
        if num_kv_heads not in self._key_value:
            shape = (num_kv_heads, self.topology.tp // num_kv_heads)
            self._key_value[num_kv_heads] = unflatten(self.tp.mesh, shape, ("kv_head", "kv_copy"))
        return self._key_value[num_kv_heads]


def has_fused_matmuls(device: torch.device) -> bool:
    """Whether matmuls can be fused with collectives: on CUDA GPUs of a node that each rank has to itself."""
    return device.type == "cuda" and "nccl" in dist.get_backend_config()


def local_device(local_rank: int) -> torch.device:
    """This process's device: its CUDA GPU where there are any, else the CPU.

    Raises:
        RuntimeError: the node has fewer GPUs than ranks, and nobody has asked for that (`SHARE_GPUS`).
    """
    if torch.cuda.is_available():
        gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if ranks > gpus and not shares_gpus():
            raise RuntimeError(
                f"{ranks} ranks of this node would share {gpus} GPUs, many times slower than one each\n"
                f"  fix: ask for {ranks} GPUs a node, or, only to try things out: export {SHARE_GPUS}=1"
            )
        device = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def init_process_group(device: torch.device, timeout_s: float) -> None:
    """Join the world that torchrun describes in the environment.

    CUDA gets NCCL for tensors and gloo beside it for objects and asynchronous checkpoints. Several ranks on one
    GPU (trying things out on a small machine) get gloo alone: NCCL refuses to share a GPU.
    """
    backend = "gloo"
    if device.type == "cuda":
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
        backend = "cpu:gloo,cuda:gloo" if shared else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
