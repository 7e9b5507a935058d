"""Torch code run without computing: shapes and lifetimes of all tensors are real, their numbers are not.

Tensors are ordinary CPU tensors on memory that is reserved and never touched, so that the system gives it no pages.
What an operation returns is inferred once for each signature, on torch's fake tensors, and made anew from then on.
That is several times as quick as running everything under `FakeTensorMode`, and code that looks at devices, streams
and storages (FSDP2, the fused optimizer, pipeline stages) meets what it meets in a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tplaunch.torch_private import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    active_fake_mode,
    storage_id,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

COMMUNICATION = ("c10d", "_c10d_functional")
_SMALL = 4096  # bytes; such tensors are zeroed, for what is read of them (loss and norm, counts)

OnCommunication = Callable[[OpOverload, tuple[Any, ...], Any], None]


@dataclass(frozen=True)
class _New:
    """An output in memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Alias:
    """An output that is an input, or a view of it (`shape` and what follows given)."""

    source: int  # number among the tensors of the arguments
    shape: torch.Size | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0


class Phantom(TorchDispatchMode):
    """Within it, operations compute nothing; the bytes of all live storages that they made are counted.

    Operations on tensors from outside (a device mesh's rank numbers) run as they are. `.item()` returns 1:
    the trainer reads scalars only to vote on static shapes and to count tokens.

    torch's own `MemTracker` counts alike (a test compares) but refuses modules that run more than once, as every
    microbatch does.

    Args:
        on_communication: called with each operation of torch.distributed, its arguments and what it returned.
    """

    def __init__(self, on_communication: OnCommunication) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._on_communication = on_communication
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._results: dict[Any, tuple[list[Any], Any]] = {}
        self._inference = FakeTensorMode()

    def __enter__(self) -> Phantom:
        # FSDP2 frees and restores gathered weights by resizing storages, which no dispatch mode sees.
        resize = self._resize = torch.UntypedStorage.resize_

        def counted_resize(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._count(storage)

        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is DTensor for t in types):
            return NotImplemented  # comes back as operations on local tensors
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler") or active_fake_mode() is not None:
            return func(*args, **kwargs)
        if self._is_outside(args, kwargs):
            result = func(*args, **kwargs)
            if func.namespace in COMMUNICATION:
                self._on_communication(func, args, result)
            return result
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        if func.namespace == "c10d":
            result = _communicate(func, args, kwargs)
        elif _is_view(func):
            return func(*args, **kwargs)
        else:
            result = self._result(func, args, kwargs)
        if func.namespace in COMMUNICATION:
            self._on_communication(func, args, result)
        return result

    def _is_outside(self, args: Any, kwargs: Any) -> bool:
        first = _first_tensor(args)
        if first is None:
            return "device" in kwargs and kwargs["device"] is not None and kwargs["device"].type == "meta"
        if first.device.type == "meta":
            return kwargs.get("device", first.device).type == "meta"
        return storage_id(first) not in self._sizes

    def _result(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        key = (func, _signature(args), _signature(kwargs))
        if key not in self._results:
            self._results[key] = self._infer(func, args, kwargs)
        specs, form = self._results[key]
        inputs: list[Tensor] | None = None
        outputs = []
        for spec in specs:
            if isinstance(spec, _New):
                outputs.append(self._make(spec))
            elif isinstance(spec, _Alias):
                inputs = inputs or _tensors(args, kwargs)
                outputs.append(_alias(inputs[spec.source], spec))
            else:
                outputs.append(spec)
        return tree_unflatten(outputs, form)

    def _infer(self, func: OpOverload, args: Any, kwargs: Any) -> tuple[list[Any], Any]:
        with self._inference:
            args, kwargs = tree_map_only(Tensor, _like, (args, kwargs))
            if func is torch.ops.aten.randn.generator:  # fake tensors take none
                func, kwargs = torch.ops.aten.randn.default, {k: v for k, v in kwargs.items() if k != "generator"}
            inputs = _tensors(args, kwargs)
            outputs, form = tree_flatten(func(*args, **kwargs))
        places = {storage_id(t): i for i, t in enumerate(inputs)}
        return [_describe(output, inputs, places) for output in outputs], form

    def _make(self, spec: _New) -> Tensor:
        tensor = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
        if self._count(tensor.untyped_storage()) <= _SMALL:
            tensor.zero_()
        return tensor

    def _count(self, storage: torch.UntypedStorage) -> int:
        """Note a storage's size, new or changed; returns it."""
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        reference = weakref.ref(storage, lambda _: self._forget(key)) if known is None else known[0]
        self.bytes += size - (0 if known is None else known[1])
        self._sizes[key] = (reference, size)
        self.peak = max(self.peak, self.bytes)
        return size

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)[1]


def _communicate(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """Ask the fake process group on empty tensors, which are not split: it copies what it is given."""
    args = tuple([] if isinstance(arg, list) and arg and isinstance(arg[0], int) else arg for arg in args)
    result = func(*tree_map_only(Tensor, lambda t: torch.empty(0, dtype=t.dtype), args), **kwargs)
    return (args[0], *result[1:]) if isinstance(result, tuple) else result


@cache
def _is_view(func: OpOverload) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _first_tensor(args: Any) -> Tensor | None:
    for arg in args:
        if isinstance(arg, (list, tuple)) and arg:
            arg = arg[0]
        if isinstance(arg, Tensor):
            return arg
    return None


def _signature(value: Any) -> Any:
    """What the result's shape can depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(part)) for key, part in value.items())
    return None if isinstance(value, torch.Generator) else (type(value), value)


def _like(tensor: Tensor) -> Tensor:
    """A tensor of that layout, for inference."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _describe(output: Any, inputs: list[Tensor], places: dict[int, int]) -> Any:
    if not isinstance(output, Tensor):
        return output
    for i, tensor in enumerate(inputs):
        if output is tensor:
            return _Alias(i)
    source = places.get(storage_id(output))
    if source is None:
        return _New(output.shape, output.stride(), output.dtype)
    return _Alias(source, output.shape, output.stride(), int(output.storage_offset()))


def _alias(tensor: Tensor, spec: _Alias) -> Tensor:
    if spec.shape is None:
        return tensor
    return tensor.as_strided(spec.shape, spec.stride, tensor.storage_offset() + spec.offset)


class _FusedRMSNorm(torch.autograd.Function):
    """What CUDA's kernel keeps and makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=dtype))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` as a GPU runs it, in one operation; torch on the CPU runs several, which keep more."""
    return _FusedRMSNorm.apply(x, weight)
