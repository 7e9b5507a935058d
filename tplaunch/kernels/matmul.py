"""Matmuls of tokens in fp32 on a CPU, by the faster of the two libraries that torch comes with, in the faster order.

torch multiplies fp32 by MKL, which uses AVX-512 on Intel's CPUs alone; oneDNN uses it on all, twice as fast on an AMD
EPYC. Everything else goes to torch's own operators. oneDNN compiles a kernel for each shape and keeps it, so that it
gets tokens in multiples of 32, and MKL the few that are left: numbers of tokens, of an expert or a prompt, are many.

Autograd functions call these: where autograd itself watches, all is torch's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tplaunch.torch_private import onednn_linear

_STEP = 32  # tokens
_PIECE = 1 << 19  # elements of a product that is added up: what a core's cache holds
_FEW = 8  # tokens, from which on the common way is as fast; half as many where the weight is wider than high
_LARGE = 2**16  # elements of a weight: smaller ones are read in no time


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, [..., k] and [n, k] -> [..., n].

    As few tokens as when text is generated take the time of reading the weight, and MKL reads it two to four times as
    fast as the left factor of W x^T than as the right one of x W^T, and one row as fast as two only where it is given
    two.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    few = _FEW if weight.shape[0] >= weight.shape[1] else _FEW // 2
    if not 0 < tokens <= few or x.dtype != torch.float32 or not x.is_cpu or weight.numel() < _LARGE:
        return matmul(x, weight.t())
    columns = x.reshape(tokens, -1)
    if tokens == 1:
        columns = torch.cat([columns, columns])
    out = x.new_empty(*x.shape[:-1], len(weight))  # what an autograd function gives must be no view
    out.view(tokens, -1).copy_(torch.mm(weight, columns.t())[:, :tokens].t())
    return out


def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """[..., k] tokens times [k, n] -> [..., n]."""
    tokens = x.numel() // max(1, x.shape[-1])
    whole = _for_onednn(x, matrix, tokens)
    if not whole:
        return x @ matrix
    if whole == tokens:
        return onednn_linear(x, matrix.t())
    out, rows = x.new_empty(*x.shape[:-1], matrix.shape[1]), x.reshape(tokens, -1)
    matmul_into(out.view(tokens, -1), rows, matrix)
    return out


def matmul_into(out: Tensor, x: Tensor, matrix: Tensor, *, add: bool = False) -> None:
    """Write [tokens, k] times [k, n] to [tokens, n], or add it."""
    whole = _for_onednn(x, matrix, len(x))
    if whole:
        _put(out[:whole], onednn_linear(x[:whole], matrix.t()), add)
        out, x = out[whole:], x[whole:]
    if not len(x):
        return
    if add:
        torch.addmm(out, x, matrix, out=out)
    else:
        torch.mm(x, matrix, out=out)


def over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """[n, tokens] times [tokens, k] -> [n, k], the gradient of a weight."""
    if not _for_onednn(left, right, len(right)):
        return left @ right
    total = left.new_empty(len(left), right.shape[1])
    add_over_tokens(total, left, right, begun=False)
    return total


def add_over_tokens(total: Tensor, left: Tensor, right: Tensor, *, begun: bool) -> None:
    """Add [n, tokens] times [tokens, k], of one dtype, to the gradient of a weight [n, k], of that or of another.

    Args:
        begun: whether there is something to add it to; else it is written over what is there.
    """
    if total.dtype != left.dtype:
        _put(total, left @ right, begun)
        return
    tokens = len(right)
    whole = _for_onednn(left, right, tokens)
    if whole:
        height = max(1, _PIECE // right.shape[1])
        others = right[:whole].t()
        for some, rows in zip(total.split(height), left[:, :whole].split(height), strict=True):
            _put(some, onednn_linear(rows, others), begun)
        begun = True
    if 0 < whole == tokens:
        return
    if begun:
        torch.addmm(total, left[:, whole:], right[whole:], out=total)
    else:
        torch.mm(left, right, out=total)


def _put(out: Tensor, product: Tensor, add: bool) -> None:
    if add:
        out.add_(product)
    else:
        out.copy_(product)


def _for_onednn(left: Tensor, right: Tensor, tokens: int) -> int:
    """How many of the tokens are oneDNN's."""
    if not left.is_cpu or left.dtype != torch.float32 or right.dtype != torch.float32 or not _onednn_is_faster():
        return 0
    both = (left, right)
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in both)
    watched = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in both)
    return tokens // _STEP * _STEP if plain and not watched and not torch.compiler.is_compiling() else 0


@cache
def _onednn_is_faster() -> bool:
    """Whether the CPU has AVX-512 and is not Intel's."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    return backends.cpu.get_cpu_capability().startswith("AVX512") and _maker() not in ("GenuineIntel", None)


def _maker() -> str | None:
    """Who made the CPU, as it says itself; None where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)
