"""Sharded data parallelism by FSDP2, as ZeRO stages (Rajbhandari et al. 2020, arXiv 1910.02054).

    zero  between steps a rank holds           during a step                       gradients are reduced
    0     everything                           everything                          once a step (all-reduce)
    1     1/dp of weights and optimizer state  whole weights, whole gradients      once a step (reduce-scatter)
    2     1/dp of weights and optimizer state  whole weights, 1/dp of gradients    every microbatch
    3     1/dp of weights and optimizer state  1/dp of both, one block at a time   every microbatch

FSDP2 shards fp32 master weights and gradients (fp64 in fp64 runs): the "weights" above. Gathered weights are in the
compute dtype. Gradients are summed, never averaged: the loss already carries 1 / (tokens of the global batch).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tplaunch.recipe.schema import Precision

STORAGE_DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
}
COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def shard(module: nn.Module, mesh: DeviceMesh, *, zero: int, precision: Precision, root: bool = False) -> None:
    """Put one unit under FSDP2: a block, or the stage (`root`) with what its blocks have left.

    Args:
        mesh: 1-D, or (replicate, shard).
        root: the outermost unit, whose few parameters stay gathered from the first use to the end of the step.
    """
    storage, compute = STORAGE_DTYPE[precision], COMPUTE_DTYPE[precision]
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != storage else None,
        reduce_dtype=storage if compute != storage else None,
        cast_forward_inputs=False,
    )
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=zero == 3 and not root)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum, and ours is scaled by one


def units(module: nn.Module) -> list[FSDPModule]:
    """The FSDP2 units of a stage, itself included."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def begin_microbatch(stage: FSDPModule, *, zero: int, last: bool) -> None:
    """Say, before its forward pass, what the backward pass of one microbatch does with gradients and weights.

    Used where we drive the microbatches; a pipeline schedule that sees an FSDPModule does the same for ZeRO 0 and 1.
    """
    reduce = last or zero >= 2
    stage.set_is_last_backward(last)
    stage.set_requires_gradient_sync(reduce)
    stage.set_reshard_after_backward(last or zero == 3)
