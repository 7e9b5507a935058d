"""Data parallelism by FSDP2, for ZeRO 2 and 3 (Rajbhandari et al. 2020, arXiv 1910.02054).

    zero  between steps a rank holds           during a step                       gradients are reduced
    2     1/dp of weights and optimizer state  whole weights, 1/dp of gradients    every microbatch
    3     1/dp of weights and optimizer state  1/dp of both, one block at a time   every microbatch

FSDP2 shards fp32 master weights and gradients (fp64 in fp64 runs): the "weights" above. Gathered weights are in the
compute dtype. Gradients are summed, never averaged: the loss already carries 1 / (tokens of the global batch).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tplaunch.parallel.precision import COMPUTE_DTYPE, STORAGE_DTYPE
from tplaunch.parallel.shard import ParameterShard
from tplaunch.recipe.schema import Precision
from tplaunch.spec.parameters import Parameter


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    zero: int,
    precision: Precision,
    reduce: torch.dtype | None = None,
    root: bool = False,
    also: tuple[str, ...] = (),
    within: str = "",
) -> None:
    """Put one unit under FSDP2: a block, or the stage (`root`) with what its blocks have left.

    Args:
        mesh: 1-D, or (replicate, shard).
        reduce: dtype of gradients while they are reduced; default: the storage dtype, which the sums have always.
        root: the outermost unit, whose few parameters stay gathered from the first use to the end of the step.
        also: methods that run the unit, as `forward` does.
        within: a submodule that, if it is a unit itself, is gathered as a forward pass enters this one. Experts would
            else be gathered when the host has waited for the router's counts, while everything waits for them.
    """
    storage, compute = STORAGE_DTYPE[precision], COMPUTE_DTYPE[precision]
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != storage else None,
        reduce_dtype=(reduce or storage) if compute != storage else None,
        cast_forward_inputs=False,
    )
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=zero == 3 and not root)
    assert isinstance(module, FSDPModule)
    for method in also:
        register_fsdp_forward_method(module, method)
    parts = dict(module.named_modules())
    if within and isinstance(part := parts.get(within), FSDPModule):
        module.set_modules_to_forward_prefetch([part])
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum, and ours is scaled by one


class FsdpSharding:
    """A stage under FSDP2; see `tplaunch.parallel.shard.Sharding`.

    Args:
        module: the stage, whose units were given to `shard`.
        parameters: what each parameter is.
        zero: the ZeRO stage.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, Parameter], *, zero: int) -> None:
        assert isinstance(module, FSDPModule)
        self.module, self.zero = module, zero
        self.units = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self.sources: dict[str, DTensor] = {}
        self.shards: list[ParameterShard] = []
        for name, tensor in module.named_parameters():
            assert isinstance(tensor, DTensor)
            self.sources[name] = tensor
            weight = tensor.to_local().detach()
            self.shards.append(ParameterShard(name, parameters[name], weight, tensor))

    def begin_microbatch(self, *, last: bool) -> None:
        """See `Sharding`: gradients are reduced after each microbatch anyway; ZeRO 3 lets go of weights, too."""
        self.module.set_is_last_backward(last)
        self.module.set_reshard_after_backward(last or self.zero == 3)

    def begin_step(self, microbatches: int) -> None:
        """See `Sharding`."""
        self.begin_microbatch(last=True)

    def reduce_gradients(self) -> None:
        """See `Sharding`: FSDP2 has reduced them."""

    def gradient(self, shard: ParameterShard) -> Tensor:
        """See `Sharding`."""
        grad = self.sources[shard.name].grad
        if grad is None:
            raise RuntimeError(f"{shard.name} got no gradient: it takes no part in the loss")
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def settle(self) -> None:
        """See `Sharding`: publishing is no work here."""

    def publish(self) -> None:
        """See `Sharding`: FSDP2 gathers what it needs."""

    def zero_grad(self) -> None:
        """See `Sharding`."""
        for source in self.sources.values():
            source.grad = None

    def release(self) -> None:
        """See `Sharding`."""
        for unit in self.units:
            unit.reshard()
