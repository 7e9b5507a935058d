"""Every name of torch that is not public, in one place, so that a new torch fails here, in one sentence.

What is used is the same in torch 2.11 to 2.14; `tests/test_torch_private.py` has a test for each. Imports that cost
time lie inside the functions that need them. (`run/flight.py` reads the flight recorder where torch is loaded
already: the launcher, which must not import torch, shares that file.)
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # defines torch.ops.symm_mem
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# The operators below torch's functional collectives: those wrap each result in a tensor subclass that waits at its
# first use, and its dispatch costs more than a small collective. Here every result is waited for by hand.
collective_ops = torch.ops._c10d_functional
# Matmuls fused with collectives by symmetric memory.
symmetric_memory_ops = torch.ops.symm_mem


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by oneDNN, which torch's own matmuls in fp32 do not use: [..., k] and [n, k] -> [..., n], which is no view,
    as of torch's own."""
    rows = x.reshape(-1, x.shape[-1])
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, None, "none", [], "")
    return product if x.dim() == 2 else torch.ops.aten._unsafe_view.default(product, [*x.shape[:-1], len(weight)])


class UnsupportedTorch(RuntimeError):
    """The installed torch lacks a private name that tplaunch uses.

    Args:
        name: the name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"torch {torch.__version__} has no {name}, which tplaunch uses: install torch 2.11 to 2.14")


# Names of `simulate` alone, imported when they are asked for: `from tplaunch.torch_private import FakeStore`.
_LAZY = {
    "CollectiveOp": "torch.distributed._tools.fake_collectives",
    "FakeStore": "torch.testing._internal.distributed.fake_pg",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "OpOverload": "torch._ops",
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "active_fake_mode": "torch._guards",
    "tree_flatten": "torch.utils._pytree",
    "tree_leaves": "torch.utils._pytree",
    "tree_map_only": "torch.utils._pytree",
    "tree_unflatten": "torch.utils._pytree",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except (ImportError, AttributeError):
        raise UnsupportedTorch(f"{_LAZY[name]}.{name}") from None


def storage_id(tensor: Tensor) -> int:
    """A number that only tensors of the same storage share, while one of them lives."""
    return _get(tensor.untyped_storage(), "_cdata", "UntypedStorage._cdata")


def weak_storage(tensor: Tensor) -> Any:
    """What keeps the `storage_id` of a tensor from becoming that of another, without keeping its memory."""
    from torch.multiprocessing import reductions

    weak = _get(reductions, "StorageWeakRef", "torch.multiprocessing.reductions.StorageWeakRef")
    return weak(tensor.untyped_storage())


def _get(owner: Any, name: str, called: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise UnsupportedTorch(called) from None


def set_group_timeouts(timeout_s: float, *, without: Collection[dist.ProcessGroup] = ()) -> None:
    """Let collectives that begin from now on take so long, in every group of this process.

    Groups that are made without a timeout, such as a mesh's, do not take over the world's: gloo waits 30 minutes,
    NCCL 10. There is no public way to change that later, nor to list the groups. gloo's send and recv keep the
    timeout that their group was made with.

    Args:
        without: groups that keep theirs.
    """
    from torch.distributed import distributed_c10d

    world = _get(distributed_c10d, "_world", "distributed_c10d._world")
    set_timeout = _get(distributed_c10d, "_set_pg_timeout", "distributed_c10d._set_pg_timeout")
    for group in list(world.pg_map):
        if group not in without:
            set_timeout(timedelta(seconds=timeout_s), group)


def unflatten(mesh: DeviceMesh, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A 1-D mesh seen as one of more axes."""
    return _get(mesh, "_unflatten", "DeviceMesh._unflatten")(0, shape, names)


def rows_of(layout: DTensor, rows: Tensor, data: DeviceMesh | None) -> DTensor:
    """Some rows of a parameter as a DTensor that knows their place in the whole, sharing their memory.

    Args:
        layout: the parameter, laid on its tensor-parallel mesh.
        rows: this rank's part of the rows of its slice of it; parts are equal, rounded up.
        data: the 1-D mesh over which the rows are cut, of the same world; None: they are not.
    """
    mesh, placements = layout.device_mesh, tuple(layout.placements)
    if data is not None and data.size() > 1:
        from torch.distributed.tensor import placement_types

        slices = 1  # tensor-parallel slices of the rows, which lie between the parts of the whole
        for axis, placement in enumerate(placements):
            if isinstance(placement, Shard) and placement.dim == 0:
                slices *= mesh.size(axis)
        strided = _get(placement_types, "_StridedShard", "placement_types._StridedShard")
        cut = strided(0, split_factor=slices) if slices > 1 else Shard(0)
        mesh = _get(DeviceMesh, "_concatenate", "DeviceMesh._concatenate")([data, mesh])
        placements = (cut, *placements)
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=layout.shape, stride=layout.stride())


def assert_soon(condition: Tensor, message: str) -> None:
    """Fail where a condition [] does not hold; on a GPU some time later, so that nobody waits for it."""
    _get(torch, "_assert_async", "torch._assert_async")(condition, message)


def with_local(layout: DTensor, local: Tensor) -> DTensor:
    """A DTensor that is laid out like another, over other memory; on any device, where `DTensor.from_local` would move
    it to the mesh's."""
    return DTensor(local, _get(layout, "_spec", "DTensor._spec"), requires_grad=False)


def will_execute(node: Any) -> bool:
    """Whether the backward pass that runs now will run a node of the autograd graph. Leaves have no answer."""
    return _get(torch._C, "_will_engine_execute_node", "torch._C._will_engine_execute_node")(node)


def leave_out_dynamo() -> None:
    """Let this process, which compiles nothing, make DTensors and optimizers and step them without `torch._dynamo`.

    Their functions import it at their first call, only to tell it that they are not to be compiled: half a second and
    30 MB on every rank. What needs it yet imports it as ever.
    """
    for function in (DTensor.__init__, torch.optim.Optimizer.add_param_group):
        plain = _get(function, "__wrapped__", f"_disable_dynamo around {function.__qualname__}")
        plain.__dynamo_disable = plain
    for optimizer in (torch.optim.Adam, torch.optim.SGD):  # AdamW's step is Adam's
        setattr(optimizer, "step", torch.no_grad()(inspect.unwrap(optimizer.step)))  # noqa: B010


def as_parameter(data: DTensor) -> nn.Parameter:
    """Make a parameter of a fresh DTensor: `nn.Parameter` without its `detach`, whose sharding torch works out with
    fake tensors, for which it imports `torch._dynamo`."""
    data.requires_grad_()
    data._is_param = True  # what nn.Parameter sets on tensors of other types, and `isinstance` asks for
    return data  # type: ignore[return-value]


def record_memory() -> None:
    """From now on, remember where each block of this process's GPU memory was asked for and given back, in Python's
    frames alone: C++'s are slow to name."""
    _get(torch.cuda.memory, "_record_memory_history", "torch.cuda.memory._record_memory_history")(stacks="python")


def write_memory(path: str | None) -> None:
    """Forget what `record_memory` remembers, after writing it to a file (a pickle, for
    https://docs.pytorch.org/memory_viz), if any."""
    if path is not None:
        _get(torch.cuda.memory, "_dump_snapshot", "torch.cuda.memory._dump_snapshot")(path)
    _get(torch.cuda.memory, "_record_memory_history", "torch.cuda.memory._record_memory_history")(enabled=None)


def zero_in_place(tensors: list[Tensor]) -> None:
    """Set tensors, if any, to zero in one call."""
    if tensors:
        _get(torch, "_foreach_zero_", "torch._foreach_zero_")(tensors)


def copy_in_place(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors, if any, in one call."""
    if targets:
        _get(torch, "_foreach_copy_", "torch._foreach_copy_")(targets, sources)


def scale_in_place(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors in one call."""
    _get(torch, "_foreach_mul_", "torch._foreach_mul_")(tensors, factor)


def lerp_in_place(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors, if any, by a part of the way to their ends, in one call."""
    if tensors:
        _get(torch, "_foreach_lerp_", "torch._foreach_lerp_")(tensors, ends, weight)


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, fp64 [], its squares summed in fp64, in one call."""
    return _get(torch, "_foreach_norm", "torch._foreach_norm")(tensors, 2, torch.float64)
