"""Element-wise work of a block as one GPU kernel each, in Triton, which comes with torch's CUDA builds.

An operation of torch reads its input from the GPU's memory and writes its output to it: gated activations are four of
them, a rotation is eight. Arithmetic is in fp32. What runs them tells `fits` first: the CPU, and fp64, go on with
torch's operations, and a compiler makes kernels of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["swiglu", "geglu", "swiglu_clamped"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(x: Tensor) -> bool:
    """Whether the kernels here are for this tensor."""
    return x.is_cuda and x.dtype in _DTYPES and not torch.compiler.is_compiling()


def gated(gate: Tensor, up: Tensor, weights: Tensor | None, kind: Kind) -> Tensor:
    """act(gate) * up * weight, see `tplaunch.model.gated`.

    Args:
        gate, up: [..., f], with one step from row to row; columns lie side by side.
        weights: [...], or None.
    """
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel():
        grid, block = _rows_and_columns(out)
        _kernels().gated[grid](gate, up, weights, out, _step(gate, up), gate.shape[-1], *_how(kind, weights), block)
    return out


def gated_backward(
    gate: Tensor, up: Tensor, weights: Tensor | None, grad: Tensor, by_gate: Tensor, by_up: Tensor, kind: Kind
) -> Tensor | None:
    """The gradients of `gated`'s inputs, of what it gave.

    Args:
        by_gate, by_up: where those of gate and up are written, laid out like these.

    Returns:
        Those of the weights, where there are some.
    """
    grad, width = grad.contiguous(), grad.shape[-1]
    by_weights = None if weights is None else torch.empty_like(weights)
    if grad.numel():
        steps = _step(gate, up), _step(by_gate, by_up)
        block = min(2048, _next_power_of_2(width))
        _kernels().gated_backward[(grad.numel() // width,)](
            gate, up, weights, grad, by_gate, by_up, by_weights, *steps, width, *_how(kind, weights), block
        )
    return by_weights


def _how(kind: Kind, weights: Tensor | None) -> tuple[int, bool]:
    return get_args(Kind).index(kind), weights is not None


def _step(*tensors: Tensor) -> int:
    """Elements from row to row of all of them."""
    (step,) = {tensor.stride(-2) for tensor in tensors}
    return step


def rotate(x: Tensor, table: Tensor, out: Tensor, *, heads: int, back: bool) -> None:
    """Write rotated heads to `out`.

    Args:
        x, out: [s, b, all heads, head_dim]; channels of a head lie side by side.
        table: [2, s or 1, b or 1, 1, rotary_dim], see `rope_table`; channels beyond rotary_dim stay.
        heads: so many are rotated, the others copied.
        back: against the direction.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, batch, all_heads, head_dim = x.shape
    half = table.shape[-1] // 2
    some = min(_next_power_of_2(all_heads), max(1, 2048 // _next_power_of_2(half)))
    steps = [0 if size == 1 else step for size, step in zip(table.shape[1:3], table.stride()[1:3], strict=True)]
    grid = (rows * batch, -(-all_heads // some))
    _kernels().rotate[grid](
        x,
        out,
        table,
        *x.stride()[:3],
        *out.stride()[:3],
        table.stride(0),
        *steps,
        batch,
        all_heads,
        heads,
        -1.0 if back else 1.0,
        head_dim,
        half,
        some,
        _next_power_of_2(half),
        _next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
    )


def measure_logits(logits: Tensor, labels: Tensor, real: int, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: its largest logit, the sum of exponentials of logits less that, and the logit of its label.

    Args:
        logits: fp32 [tokens, columns].
        labels: int64 [tokens], a column here or any other number.
        real: columns that are no padding.
        softcap: c, where logits are c tanh(logit / c).

    Returns:
        fp32 [tokens] each; of no real columns the smallest number there is, and 0. A label elsewhere has 0.
    """
    top, total, target = (logits.new_empty(len(logits)) for _ in range(3))
    _kernels().measure_logits[(len(logits),)](
        logits, labels, top, total, target, logits.stride(0), real, softcap or 1.0, softcap is not None, 4096
    )
    return top, total, target


def logit_gradient(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    factor: Tensor,
    counted: Tensor,
    real: int,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """exp(logit - log_z) * factor, less `counted` at the label; by the chain rule through the soft cap.

    Args:
        log_z, factor, counted: fp32 [tokens].
        dtype: of what is returned.
        logits, labels, real, softcap: see `measure_logits`.

    Returns:
        [tokens, columns]; 0 for padding. Where the dtype is that of the logits it takes their place.
    """
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    columns = logits.shape[1]
    grid, block = _rows_and_columns(out, 4096)
    _kernels().logit_gradient[grid](
        logits, labels, log_z, factor, counted, out, logits.stride(0), columns, real,
        softcap or 1.0, softcap is not None, block,
    )  # fmt: skip
    return out


def _rows_and_columns(out: Tensor, block: int = 2048) -> tuple[tuple[int, int], int]:
    """The grid of programs that each write so many columns of a row of [..., columns]."""
    columns = out.shape[-1]
    block = min(block, _next_power_of_2(columns))
    return (out.numel() // columns, -(-columns // block)), block


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def _kernels() -> Any:
    from tplaunch.kernels import triton_kernels

    return triton_kernels
