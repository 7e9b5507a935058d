"""What data parallelism keeps of a stage: one interface over its two ways, FSDP2 and flat buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from tplaunch.spec.parameters import Parameter


@dataclass(frozen=True)
class ParameterShard:
    """What this rank keeps of one parameter: the rows that it updates.

    Args:
        name: the parameter's name in its stage (`Stage.parameters`).
        parameter: what it is.
        weight: master weights in the storage dtype, plain, this rank's rows of its tensor-parallel slice; may be empty.
        layout: a DTensor over the same memory, which knows the place in the whole: what checkpoints store.
    """

    name: str
    parameter: Parameter
    weight: Tensor
    layout: DTensor


class Sharding(Protocol):
    """Data parallelism of one stage.

    Attributes:
        shards: of every parameter, in the order of the module.
    """

    shards: list[ParameterShard]

    def begin_step(self, microbatches: int) -> None:
        """Called before a step of so many microbatches."""
        ...

    def begin_microbatch(self, *, last: bool) -> None:
        """Called before the forward pass of each microbatch where no two are in flight at once; `last` of the step."""
        ...

    def reduce_gradients(self) -> None:
        """Called after the last backward pass: complete the sum of gradients over data parallel."""
        ...

    def gradient(self, shard: ParameterShard) -> Tensor:
        """The gradient of a shard, in the dtype that it is kept in, sharing memory with what was accumulated.

        Raises:
            RuntimeError: there is none.
        """
        ...

    def settle(self) -> None:
        """Called before master weights are read from a file, and before the world ends: nothing of a `publish` may
        still be under way."""
        ...

    def publish(self) -> None:
        """Called when master weights have changed: let the module compute with them."""
        ...

    def zero_grad(self) -> None:
        """Called after an update: forget the gradients."""
        ...

    def release(self) -> None:
        """Let go of weights that were gathered for a pass."""
        ...
