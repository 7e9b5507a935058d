"""Data parallelism over flat buffers, for ZeRO 0 and 1 and where there is nobody to share with (Megatron's
DistributedDataParallel and distributed optimizer; Rajbhandari et al. 2020, arXiv 1910.02054).

    zero  between steps a rank holds                              a step ends with
    0     weights and optimizer state whole                       all-reduce of gradients
    1     weights whole, master weights and state of its rows     reduce-scatter of gradients, all-gather of weights,
                                                                  which goes on behind the next forward pass

A stage's gradients lie in one buffer of the storage dtype (fp32; fp64 in fp64 runs), to which backward passes add in
place; its weights in another, of the compute dtype. Where the two dtypes are one, master weights are a view of the
weights. Rows of a parameter are cut over data parallel as FSDP2 cuts them, into equal parts, rounded up; each
parameter's place in the buffers is padded to whole parts, so that collectives work on the buffers themselves and
nothing is copied.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE, STORAGE_DTYPE
from tplaunch.parallel.shard import ParameterShard
from tplaunch.recipe.schema import Precision
from tplaunch.spec.parameters import Parameter
from tplaunch.torch_private import copy_in_place, rows_of, zero_in_place

_BY_MATMUL = ("matrix", "embedding", "output")  # roles of parameters whose layers use an `Accumulator`
_ALIGN = 64  # elements: every parameter begins on a boundary that vector instructions like


class FlatSharding:
    """Puts a stage's parameters into flat buffers; see `Sharding`.

    Args:
        module: a stage on the meta device; its parameters are replaced by plain ones, in the buffers.
        parameters: what each is.
        mesh: the mesh.
        precision: names the dtypes.
        in_place: the matmul that computes a weight gradient may add it to the buffer itself: backward passes are not
            split in two.
        overlap: a block's gradients are complete when a backward pass leaves it: passes are not split in two.
        compiled: blocks are compiled.
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
    ) -> None:
        self.mesh = mesh
        self.parts = mesh.world["dp_shard"].size()  # 1 with ZeRO 0, which replicates all the way
        self.part = mesh.world.get_local_rank("dp_shard")
        self.storage, self.compute = STORAGE_DTYPE[precision], COMPUTE_DTYPE[precision]
        layouts = {name: tensor for name, tensor in module.named_parameters() if isinstance(tensor, DTensor)}
        sizes = [self._padded(layout) for layout in layouts.values()]
        self.weights = torch.zeros(sum(sizes), dtype=self.compute, device=mesh.device)
        self.gradients = torch.zeros(sum(sizes), dtype=self.storage, device=mesh.device)
        self.slots: dict[str, tuple[Tensor, Tensor]] = {}  # name -> its padded rows of weights and of gradients
        self.shards: list[ParameterShard] = []
        self.overlaps = overlap and (self.parts > 1 or mesh.dp_replicate > 1)
        # gloo's reduce-scatter is an all-reduce of a copy; and a call of it costs more than the bytes of a parameter.
        self.sums_whole = self.parts == 1 or dist.get_backend(mesh.world.get_group("dp_shard")) == "gloo"
        self._accumulators: defaultdict[str, list[Accumulator]] = defaultdict(list)  # block -> of its matrices
        further: list[Tensor] = []  # gradients that no `Accumulator` writes over
        self._passes_left: dict[str, int] = {}  # block -> backward passes of this step still to come
        self._reduced: set[str] = set()
        self._reductions: list[dist.Work] = []
        self._gathers: dict[str, list[dist.Work]] = {}  # of the weights of a block, under way
        for (name, layout), weights, gradients in zip(
            layouts.items(), self.weights.split(sizes), self.gradients.split(sizes), strict=True
        ):
            local = layout.to_local().shape
            rows = self._rows(layout)
            padded = torch.Size((rows * self.parts, *local[1:]))
            weights, gradients = weights[: padded.numel()].view(padded), gradients[: padded.numel()].view(padded)
            self.slots[name] = weights, gradients
            # `data` counts its changes by itself: a gather of one block is no change to another's saved weights.
            parameter = nn.Parameter(weights[: local[0]].data)
            parameter.grad_dtype = self.storage
            if in_place and parameters[name].role in _BY_MATMUL:
                total = parameter.accumulator = Accumulator(gradients[: local[0]])  # type: ignore[attr-defined]
                self._accumulators[_block_of(name)].append(total)
            elif compiled:  # dynamo refuses a parameter whose gradient has another dtype
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, gradients[: local[0]]))
                further.append(gradients)
            else:
                parameter.grad = gradients[: local[0]]
                further.append(gradients)
            _replace(module, name, parameter)
            master = weights[min(self.part * rows, local[0]) : min((self.part + 1) * rows, local[0])]
            if self.storage != self.compute:
                master = torch.zeros_like(master, dtype=self.storage)
            place = rows_of(layout, master, mesh.world, self.parts)
            self.shards.append(ParameterShard(name, parameters[name], master, place))
        self._zeroed = further if in_place else [self.gradients]
        self.blocks = self._blocks(list(layouts), sizes)
        self._shards_of: dict[str, list[ParameterShard]] = {block: [] for block in self.blocks}
        for shard in self.shards:
            self._shards_of[_block_of(shard.name)].append(shard)

    def _blocks(self, names: list[str], sizes: list[int]) -> dict[str, Tensor]:
        """The gradients of each block, and of what stands before and after the blocks: consecutive in the buffer."""
        ends: dict[str, tuple[int, int]] = {}
        begin = 0
        for name, size in zip(names, sizes, strict=True):
            first, _ = ends.get(_block_of(name), (begin, begin))
            ends[_block_of(name)] = first, begin + size
            begin += size
        return {block: self.gradients[first:last] for block, (first, last) in ends.items()}

    def _rows(self, layout: DTensor) -> int:
        """Rows of one part of a parameter's tensor-parallel slice."""
        return -(-layout.to_local().shape[0] // self.parts)

    def _padded(self, layout: DTensor) -> int:
        """Elements of a parameter's place in the buffers."""
        elements = self._rows(layout) * self.parts * layout.to_local().shape[1:].numel()
        return -(-elements // _ALIGN) * _ALIGN

    def _mine(self, whole: Tensor) -> Tensor:
        """This rank's padded rows of a parameter's place."""
        return whole.chunk(self.parts)[self.part]

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
        if self._reductions:
            _wait(self._reductions)
            if self.parts > 1 and self.mesh.dp_replicate > 1:
                group = self.mesh.world.get_group("dp_replicate")
                _wait([dist.all_reduce(self._mine(g), group=group, async_op=True) for _, g in self.slots.values()])

    def _reduce(self, block: str) -> None:
        """Complete the gradients of a block, and begin to sum them over data parallel: whole, or this rank's rows of
        each parameter."""
        for accumulator in self._accumulators[block]:
            accumulator.finish()
        if self.parts == 1 and self.mesh.dp_replicate == 1:
            return
        if self.sums_whole:
            group = self.mesh.world.get_group("dp_shard" if self.parts > 1 else "dp_replicate")
            self._reductions.append(dist.all_reduce(self.blocks[block], group=group, async_op=True))
            return
        group = self.mesh.world.get_group("dp_shard")
        for shard in self._shards_of[block]:
            _, gradients = self.slots[shard.name]
            self._reductions.append(_reduce_scatter(self._mine(gradients), gradients, group=group, async_op=True))

    def gradient(self, shard: ParameterShard) -> Tensor:
        """See `Sharding`."""
        return self._mine(self.slots[shard.name][1])[: shard.weight.shape[0]]

    def settle(self) -> None:
        """See `Sharding`."""
        for block in self.blocks:
            self.block_begins(block)

    def publish(self) -> None:
        """See `Sharding`: each rank's rows, in the compute dtype, to all; block by block, while the next forward pass
        is at work already (`block_begins`)."""
        self.settle()
        for block, shards in self._shards_of.items():
            places = [self.slots[shard.name][0] for shard in shards]
            if self.storage != self.compute:
                rows = [shard.weight for shard in shards]
                copy_in_place([self._mine(place)[: len(own)] for place, own in zip(places, rows, strict=True)], rows)
            if self.parts > 1:
                group = self.mesh.world.get_group("dp_shard")
                self._gathers[block] = [
                    _all_gather(place, self._mine(place), group=group, async_op=True) for place in places
                ]

    def zero_grad(self) -> None:
        """See `Sharding`."""
        zero_in_place(self._zeroed)

    def release(self) -> None:
        """See `Sharding`: weights are never let go of."""


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
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
