"""What gradients still need after the backward passes: sums over copies, the true global norm, clipping.

First they are summed over data parallel. Left are sums that belong to the model's own parallelism, each one
collective a step on the sharded gradients, as in Megatron's `finalize_model_grads`:

- over tp, for replicated parameters that each rank applied to only its shard of the sequence (with sequence
  parallelism; a router always) or of the heads (q/k norms);
- over the copies of a key/value head that several tp ranks hold;
- over the ranks that share an expert, for its bias that none of them cuts;
- between first and last stage, for a tied embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.model.build import Stage
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.shard import ParameterShard, Sharding
from tplaunch.spec.parameters import Parameter
from tplaunch.spec.schedules import stage_rank
from tplaunch.torch_private import copy_in_place, norms, scale_in_place


def sum_in_place(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce tensors of one dtype in one call."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    totals = flat.split([t.numel() for t in tensors])
    copy_in_place(tensors, [total.view_as(tensor) for tensor, total in zip(tensors, totals, strict=True)])


class _Held(NamedTuple):
    """A parameter that this rank holds rows of."""

    sharding: Sharding
    shard: ParameterShard

    @property
    def gradient(self) -> Tensor:
        return self.sharding.gradient(self.shard)


class GradientFinalizer:
    """Completes and measures the gradients of one rank's stages.

    Args:
        stages: this rank's stages.
        mesh: the mesh.
        schedule, num_stages: where first and last stage are.
        tied: the model ties its output matrix to the embedding.
    """

    def __init__(self, stages: list[Stage], mesh: Mesh, *, schedule: str, num_stages: int, tied: bool) -> None:
        self.mesh = mesh
        self.shardings = [stage.sharding for stage in stages]
        tp = mesh.tp.size
        self.replicated: list[_Held] = []  # summed over tp
        self.expert_replicated: list[_Held] = []  # summed over expert_tp
        self.key_value: dict[int, list[_Held]] = {}  # number of heads -> summed over the copies of each
        self.owned: list[_Held] = []  # each number of the model on exactly one rank
        self.tied: list[_Held] = []
        self.all: list[_Held] = []
        for stage in stages:
            for shard in (shard for shard in stage.sharding.shards if shard.parameter.trained):
                held, parameter = _Held(stage.sharding, shard), shard.parameter
                copy = stage.module.tied_copy and shard.name == "output.weight"
                self.all.append(held)
                if parameter.expert:
                    assert mesh.experts is not None
                    rank, copies = mesh.experts.tp.rank, 1
                    if parameter.expert_tp_dim is None and mesh.experts.tp.size > 1:
                        copies = mesh.experts.tp.size
                        self.expert_replicated.append(held)
                else:
                    rank, copies = mesh.tp.rank, parameter.copies(tp)
                    if parameter.tp_dim is None and tp > 1 and (mesh.tp.sequence_parallel or _sees_a_part(parameter)):
                        self.replicated.append(held)
                    elif parameter.tp_dim is not None and copies > 1:
                        self.key_value.setdefault(parameter.pieces, []).append(held)
                if parameter.name == "embedding.weight":
                    self.tied.append(held)
                if mesh.data_ranks(parameter).copy == 0 and rank % copies == 0 and not copy:
                    self.owned.append(held)
        self.tied_group = None
        last = stage_rank(num_stages - 1, mesh.topology.pp, schedule)
        self.tied_apart = tied and last != 0
        self.tied_together = tied and last == 0 and num_stages > 1
        if self.tied_apart:
            self.tied_group = self._pair_groups(last)

    def _pair_groups(self, last: int) -> dist.ProcessGroup | None:
        """Groups of (first stage, last stage) ranks; returns this rank's. Every rank must make all of them."""
        mine = None
        for ranks in self.mesh.topology.groups("pp"):
            pair = [ranks[0], ranks[last]]
            group = dist.new_group(pair)
            if dist.get_rank() in pair:
                mine = group
        return mine

    def complete(self) -> None:
        """Sum the gradients over data parallel, and over the copies that saw different parts of the model."""
        for sharding in self.shardings:
            sharding.reduce_gradients()
        if self.replicated:
            sum_in_place([held.gradient for held in self.replicated], self.mesh.tp.group)
        if self.expert_replicated:
            assert self.mesh.experts is not None
            sum_in_place([held.gradient for held in self.expert_replicated], self.mesh.experts.tp.group)
        for heads, helds in self.key_value.items():
            sum_in_place([held.gradient for held in helds], self.mesh.key_value(heads).get_group("kv_copy"))
        if self.tied_group is not None:
            sum_in_place([held.gradient for held in self.tied], self.tied_group)
        elif self.tied_together and self.tied:
            first, last = (held.gradient for held in self.tied)
            first.add_(last)
            last.copy_(first)

    def square_sum(self) -> Tensor:
        """Sum of squares of the gradients that this rank counts, fp64 [], so that the world's sum is the norm^2."""
        return square_sum(held.gradient for held in self.owned).to(self.mesh.device)

    def scale(self, factor: float) -> None:
        """Multiply every gradient of this rank."""
        scale_in_place([held.gradient for held in self.all], factor)


def square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements, fp64 [], summed wide.

    Summed in fp32, as is torch's default, the squares of 25M numbers are 1e-3 off on a CPU. Summing them in fp64 takes
    it 30 times as long as reading them; sums of short rows in fp32, and of the rows in fp64, are 1e-9 off and free.
    """
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64)
    if not filled[0].is_cuda:
        rows = [row for tensor in filled for row in _rows(tensor.reshape(-1))]
        wide = torch.float32 if filled[0].dtype == torch.bfloat16 else None
        total = (
            torch.cat([torch.linalg.vector_norm(row, dim=-1, dtype=wide) for row in rows])
            .to(torch.float64)
            .square_()
            .sum()
        )
        if 1e-30 < total < torch.inf:  # else squares that fp32 cannot hold
            return total
    return torch.stack(norms(filled)).square().sum()


def _rows(flat: Tensor, width: int = 256) -> list[Tensor]:
    """Rows of a tensor [n]: [n // width, width], and what is left [1, n % width]."""
    whole = flat.numel() // width * width
    return [part for part in (flat[:whole].view(-1, width), flat[whole:].view(1, -1)) if part.numel()]


def _sees_a_part(parameter: Parameter) -> bool:
    """Whether tp ranks apply a parameter that all of them hold to other heads, or to other tokens, without sequence
    parallelism too."""
    head_norm = parameter.name.endswith((".q_norm.weight", ".k_norm.weight"))
    return head_norm or ".moe.router." in parameter.name
