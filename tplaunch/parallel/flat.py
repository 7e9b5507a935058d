"""Data parallelism over flat buffers, for ZeRO 0 and 1 and where there is nobody to share with (Megatron's
DistributedDataParallel and distributed optimizer; Rajbhandari et al. 2020, arXiv 1910.02054).

    zero  between steps a rank holds                              a step ends with
    0     weights and optimizer state whole                       all-reduce of gradients
    1     weights whole, master weights and state of its rows     reduce-scatter of gradients, all-gather of weights,
                                                                  which goes on behind the next forward pass

A stage's gradients lie in one buffer of the storage dtype (fp32; fp64 in fp64 runs) or a narrower one, to which
backward passes add in place; its weights in another, of the compute dtype. Where storage and compute dtype are one,
master weights are a view of the weights. Rows of a parameter are cut over data parallel as FSDP2 cuts them, into equal
parts, rounded up; each parameter's place in the buffers is padded to whole parts, so that collectives work on the
buffers themselves and nothing is copied. Experts have data-parallel ranks of their own: they lie behind all else in the
buffers. Where they alone have some (tp without dp and cp), they are held as with ZeRO 1, whatever the stage. Frozen
weights have no place in the buffers: they are held whole, in the compute dtype alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.mesh import DataRanks, Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE, STORAGE_DTYPE
from tplaunch.parallel.shard import ParameterShard
from tplaunch.recipe.schema import Precision
from tplaunch.spec.parameters import Parameter
from tplaunch.torch_private import copy_in_place, rows_of, zero_in_place

_BY_MATMUL = (
    "matrix",
    "expert",
    "embedding",
    "output",
    "adapter",
)  # roles of parameters whose layers use an `Accumulator`
_ALIGN = 64  # elements: every parameter begins on a boundary that vector instructions like


@dataclass(frozen=True)
class _Slot:
    """A parameter's place in the buffers.

    Args:
        weights, gradients: its padded rows: as many for each part.
        ranks: that share them.
        shard: what this rank keeps.
    """

    weights: Tensor
    gradients: Tensor
    ranks: DataRanks
    shard: ParameterShard

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's part of padded rows."""
        return whole.chunk(self.ranks.parts)[self.ranks.part]


@dataclass(frozen=True)
class _Bucket:
    """The parameters of a block that have the same data-parallel ranks.

    Args:
        ranks: these.
        gradients: the parameters', consecutive in the buffer.
        sums_whole: what is reduced are whole gradients, not the rows of each part.
    """

    ranks: DataRanks
    gradients: Tensor
    sums_whole: bool
    slots: list[_Slot] = field(default_factory=list)
    accumulators: list[Accumulator] = field(default_factory=list)


class FlatSharding:
    """Puts a stage's parameters into flat buffers; see `Sharding`.

    Args:
        module: a stage on the meta device; its parameters are replaced by plain ones, in the buffers.
        parameters: what each is.
        mesh: the mesh.
        precision: names the dtypes of weights.
        in_place: the matmul that computes a weight gradient may add it to the buffer itself: backward passes are not
            split in two.
        overlap: a block's gradients are complete when a backward pass leaves it: passes are not split in two.
        compiled: blocks are compiled.
        gradient: dtype that gradients are added up and reduced in; default: the storage dtype.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, Parameter],
        mesh: Mesh,
        *,
        precision: Precision,
        in_place: bool,
        overlap: bool,
        compiled: bool,
        gradient: torch.dtype | None = None,
    ) -> None:
        self.storage, self.compute = STORAGE_DTYPE[precision], COMPUTE_DTYPE[precision]
        gradient = gradient or self.storage
        everything = {name: tensor for name, tensor in module.named_parameters() if isinstance(tensor, DTensor)}
        frozen = _freeze(module, {n: t for n, t in everything.items() if parameters[n].frozen}, parameters, mesh)
        layouts = {name: tensor for name, tensor in everything.items() if name not in frozen}
        names = sorted(layouts, key=lambda name: parameters[name].expert)
        ranks = {name: mesh.data_ranks(parameters[name]) for name in names}
        rows = {name: -(-layouts[name].to_local().shape[0] // ranks[name].parts) for name in names}
        sizes = {name: _padded(layouts[name], rows[name] * ranks[name].parts) for name in names}
        self.weights = torch.zeros(sum(sizes.values()), dtype=self.compute, device=mesh.device)
        self.gradients = torch.zeros(sum(sizes.values()), dtype=gradient, device=mesh.device)
        buckets = self._buckets(ranks, sizes)
        self.blocks: defaultdict[str, list[_Bucket]] = defaultdict(list)  # its parameters; those of its experts
        for (block, _), bucket in buckets.items():
            self.blocks[block].append(bucket)
        self.slots: dict[str, _Slot] = {}
        self.overlaps = overlap and any(each.parts > 1 or each.copies > 1 for each in ranks.values())
        further: list[Tensor] = []  # gradients that no `Accumulator` writes over
        self._passes_left: dict[str, int] = {}  # block -> backward passes of this step still to come
        self._reduced: set[str] = set()
        self._reductions: list[dist.Work] = []
        self._gathers: dict[str, list[dist.Work]] = {}  # of the weights of a block, under way
        all_weights, all_gradients = (buffer.split([*sizes.values()]) for buffer in (self.weights, self.gradients))
        for name, weights, gradients in zip(names, all_weights, all_gradients, strict=True):
            layout, bucket = layouts[name], buckets[_block_of(name), ranks[name]]
            local = layout.to_local().shape
            padded = torch.Size((rows[name] * bucket.ranks.parts, *local[1:]))
            weights, gradients = weights[: padded.numel()].view(padded), gradients[: padded.numel()].view(padded)
            # `data` counts its changes by itself: a gather of one block is no change to another's saved weights.
            parameter = nn.Parameter(weights[: local[0]].data)
            parameter.grad_dtype = gradient
            if in_place and parameters[name].role in _BY_MATMUL:
                total = parameter.accumulator = Accumulator(gradients[: local[0]])  # type: ignore[attr-defined]
                bucket.accumulators.append(total)
            elif compiled:  # dynamo refuses a parameter whose gradient has another dtype
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, gradients[: local[0]]))
                further.append(gradients)
            else:
                parameter.grad = gradients[: local[0]]
                further.append(gradients)
            replace_parameter(module, name, parameter)
            begin, end = (min(part * rows[name], local[0]) for part in (bucket.ranks.part, bucket.ranks.part + 1))
            master = weights[begin:end]
            if self.storage != self.compute:
                master = torch.zeros_like(master, dtype=self.storage)
            place = rows_of(layout, master, bucket.ranks.shard)
            shard = ParameterShard(name, parameters[name], master, place)
            self.slots[name] = slot = _Slot(weights, gradients, bucket.ranks, shard)
            bucket.slots.append(slot)
        self.shards = [frozen[name] if name in frozen else self.slots[name].shard for name in everything]
        self._zeroed = further if in_place else [self.gradients]

    def _buckets(self, ranks: dict[str, DataRanks], sizes: dict[str, int]) -> dict[tuple[str, DataRanks], _Bucket]:
        """The buckets of each block, and of what stands before and after the blocks; empty, in the buffer's order."""
        spans: dict[tuple[str, DataRanks], tuple[int, int]] = {}
        begin = 0
        for name, size in sizes.items():
            key = _block_of(name), ranks[name]
            spans[key] = spans.get(key, (begin, begin))[0], begin + size
            begin += size
        made = {}
        for key, (first, last) in spans.items():
            of = key[1]
            # gloo's reduce-scatter is an all-reduce of a copy; and a call of it costs more than a parameter's bytes.
            whole = of.parts == 1 or dist.get_backend(of.shard_group) == "gloo"
            made[key] = _Bucket(of, self.gradients[first:last], whole)
        return made

    def begin_step(self, microbatches: int) -> None:
        """See `Sharding`."""
        self._passes_left = dict.fromkeys(self.blocks, microbatches) if self.overlaps else {}

    def begin_microbatch(self, *, last: bool) -> None:
        """See `Sharding`: nothing changes between microbatches."""

    def block_begins(self, block: str) -> None:
        """Called as a forward pass enters a block: its weights must be there. They were gathered while the blocks
        before it were at work."""
        _wait(self._gathers.pop(block, []))

    def block_done(self, block: str) -> None:
        """Called as a backward pass leaves a block: after the last one of a step its gradients are reduced, while the
        blocks before it are still at work."""
        if block in self._passes_left:
            self._passes_left[block] -= 1
            if self._passes_left[block] == 0:
                del self._passes_left[block]
                self._reduce(block)
                self._reduced.add(block)

    def reduce_gradients(self) -> None:
        """See `Sharding`."""
        for block in self.blocks:
            if block not in self._reduced:
                self._reduce(block)
        self._reduced.clear()
        _wait(self._reductions)
        _wait(
            [
                dist.all_reduce(slot.mine(slot.gradients), group=slot.ranks.replicate_group, async_op=True)
                for slot in self.slots.values()
                if slot.ranks.parts > 1 and slot.ranks.copies > 1
            ]
        )

    def _reduce(self, block: str) -> None:
        """Complete the gradients of a block, and begin to sum them over data parallel: whole, or this rank's rows of
        each parameter."""
        for bucket in self.blocks[block]:
            for accumulator in bucket.accumulators:
                accumulator.finish()
            ranks = bucket.ranks
            if ranks.parts == 1 and ranks.copies == 1:
                continue
            group = ranks.shard_group if ranks.parts > 1 else ranks.replicate_group
            if bucket.sums_whole:
                self._reductions.append(dist.all_reduce(bucket.gradients, group=group, async_op=True))
                continue
            for slot in bucket.slots:
                mine = slot.mine(slot.gradients)
                self._reductions.append(_reduce_scatter(mine, slot.gradients, group=group, async_op=True))

    def gradient(self, shard: ParameterShard) -> Tensor:
        """See `Sharding`."""
        slot = self.slots[shard.name]
        return slot.mine(slot.gradients)[: shard.weight.shape[0]]

    def settle(self) -> None:
        """See `Sharding`."""
        for block in self.blocks:
            self.block_begins(block)

    def publish(self) -> None:
        """See `Sharding`: each rank's rows, in the compute dtype, to all; block by block, while the next forward pass
        is at work already (`block_begins`)."""
        self.settle()
        for block, buckets in self.blocks.items():
            slots = [slot for bucket in buckets for slot in bucket.slots]
            if self.storage != self.compute:
                rows = [slot.shard.weight for slot in slots]
                copy_in_place(
                    [slot.mine(slot.weights)[: len(own)] for slot, own in zip(slots, rows, strict=True)], rows
                )
            self._gathers[block] = [
                _all_gather(slot.weights, slot.mine(slot.weights), group=slot.ranks.shard_group, async_op=True)
                for slot in slots
                if slot.ranks.parts > 1
            ]

    def zero_grad(self) -> None:
        """See `Sharding`."""
        zero_in_place(self._zeroed)

    def release(self) -> None:
        """See `Sharding`: weights are never let go of."""


def _freeze(
    module: nn.Module, layouts: dict[str, DTensor], parameters: dict[str, Parameter], mesh: Mesh
) -> dict[str, ParameterShard]:
    """Give a module its frozen weights: each rank holds its tensor-parallel slices whole, in the dtype that they are
    multiplied in, and nothing beside them."""
    shards = {}
    for name, layout in layouts.items():
        local = layout.to_local()
        weight = torch.zeros(local.shape, dtype=local.dtype, device=mesh.device)
        replace_parameter(module, name, nn.Parameter(weight, requires_grad=False))
        shards[name] = ParameterShard(name, parameters[name], weight, rows_of(layout, weight, None))
    return shards


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module another parameter, wherever the old one stood."""
    owner, _, attribute = name.rpartition(".")
    old = module.get_parameter(name)
    module.get_submodule(owner).register_parameter(attribute, parameter)
    for part in module.modules():
        for key, value in part._parameters.items():
            if value is old:  # tied
                part.register_parameter(key, parameter)


def _move_gradient(total: Tensor, parameter: Tensor) -> None:
    """Add the gradient that autograd has just handed to a parameter to its place in the buffer."""
    assert parameter.grad is not None
    total += parameter.grad
    parameter.grad = None


def _padded(layout: DTensor, rows: int) -> int:
    """Elements of the place in the buffers of so many rows of a parameter."""
    return -(-rows * layout.to_local().shape[1:].numel() // _ALIGN) * _ALIGN


def _block_of(name: str) -> str:
    """The block of a parameter, such as "layers.17"; for others the part that stands by itself."""
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def _wait(works: list[dist.Work]) -> None:
    """Wait for collectives, and forget them."""
    for work in works:
        work.wait()
    works.clear()


# Their names up to torch 2.12, and from 2.13 on.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
