"""FLOPs of the operators that tplaunch multiplies by."""

from __future__ import annotations

from typing import Any


def flops(func: Any, args: Any) -> int:
    """Of a call that `TorchDispatchMode` sees; 0 where it is no matmul."""
    if func.name() in ("aten::mm", "aten::mm.out", "aten::bmm", "aten::addmm.out"):
        left, right = args[-2:]
        return 2 * left.numel() * right.shape[-1]
    if func.name() == "mkldnn::_linear_pointwise":
        return 2 * args[0].numel() * len(args[1])
    return 0
