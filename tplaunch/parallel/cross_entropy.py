"""The output layer and vocab-parallel cross-entropy in one, chunk by chunk.

Each tp rank has the logits of its vocabulary slice only, and of one chunk of tokens at a time: whole logits never
exist, on any rank, in any precision. Two all-reduces a call ([tokens] of maxima, [2, tokens] of sums) join the
slices, however many the chunks (Shoeybi et al. 2019, arXiv 1909.08053, section 3). The backward pass computes the
logits of a chunk again, which costs one more output matmul and saves their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tplaunch.parallel.collectives import enter_region, start_all_reduce, wait
from tplaunch.parallel.layers import accumulator, add_product
from tplaunch.parallel.mesh import TensorParallel
from tplaunch.parallel.split_backward import wanted

IGNORE = -100  # label of a token that does not count, as in torch.nn.functional.cross_entropy


class _OutputCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tp: TensorParallel, vocab: int, chunk: int, z: float
    ) -> Tensor:
        rows = weight.shape[0]
        first = tp.rank * rows
        real = max(0, min(rows, vocab - first))  # columns of this slice that are not padding
        accumulate_dtype = torch.promote_types(hidden.dtype, torch.float32)
        local_max, local_sum, target = (hidden.new_zeros(labels.shape, dtype=accumulate_dtype) for _ in range(3))
        for part in _chunks(len(labels), chunk):
            logits = _logits(hidden[part], weight, real, accumulate_dtype)
            # A slice of nothing but padding has no maximum; a finite stand-in keeps NaN out.
            local_max[part] = logits.amax(-1).clamp_min(torch.finfo(accumulate_dtype).min)
            local_sum[part] = (logits - local_max[part].unsqueeze(-1)).exp_().sum(-1)
            column = labels[part] - first
            mine = (column >= 0) & (column < rows)
            picked = logits.gather(-1, column.clamp(0, rows - 1).unsqueeze(-1)).squeeze(-1)
            target[part] = torch.where(mine, picked, 0.0)
        top = local_max
        if tp.size > 1:
            top = wait(start_all_reduce(local_max, tp, "max"))
            sums = torch.stack([local_sum * (local_max - top).exp(), target])
            local_sum, target = wait(start_all_reduce(sums, tp)).unbind(0)
        log_z = top + local_sum.log()
        counted = labels != IGNORE
        losses = torch.where(counted, log_z - target + z * log_z.square(), 0.0)
        ctx.accumulator = accumulator(weight)
        ctx.save_for_backward(hidden, weight, labels, log_z)
        ctx.setting = (first, real, chunk, z, accumulate_dtype)
        return losses.sum(dtype=torch.float64).to(accumulate_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_z = ctx.saved_tensors
        first, real, chunk, z, accumulate_dtype = ctx.setting
        need_hidden, need_weight = wanted(ctx, 0, 1)
        counted = labels != IGNORE
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Several chunks are summed in the accumulate dtype: bf16 would lose the small ones.
        grad_weight = ctx.accumulator if need_weight else None
        if need_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=accumulate_dtype)
        scale = torch.where(counted, grad * (1 + 2 * z * log_z), 0.0)
        hit_scale = torch.where(counted, grad, 0.0)
        for part in _chunks(len(labels), chunk):
            logits = _logits(hidden[part], weight, real, accumulate_dtype)
            grad_logits = (logits - log_z[part].unsqueeze(-1)).exp_().mul_(scale[part].unsqueeze(-1))
            column = labels[part] - first
            mine = (column >= 0) & (column < weight.shape[0])
            hit = torch.where(mine, hit_scale[part], 0.0).unsqueeze(-1)
            grad_logits.scatter_add_(-1, column.clamp(0, weight.shape[0] - 1).unsqueeze(-1), -hit)
            grad_compute = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_compute @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_compute.t(), hidden[part])
        handed = None
        if grad_weight is not None and ctx.accumulator is None:
            handed = grad_weight.to(weight.dtype)
        return grad_hidden, handed, None, None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(hidden: Tensor, weight: Tensor, real: int, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ weight.t()).to(dtype)
    logits[:, real:] = -torch.inf
    return logits


def output_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp: TensorParallel,
    vocab_size: int,
    chunk: int = 1024,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden weight^T) against labels.

    Args:
        hidden: [s or s/tp, b, h], the output of the final norm.
        weight: [padded vocab/tp, h], this rank's rows of the output matrix.
        labels: int64 [b, s]; `IGNORE` where a token does not count.
        tp: the group; its sequence_parallel says whether `hidden` is a slice.
        vocab_size: real size of the vocabulary; padded columns get no probability.
        chunk: tokens whose logits exist at a time.
        z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311, section 5).

    Returns:
        fp32 scalar (fp64 for fp64 input), the same on every tp rank.
    """
    hidden = enter_region(hidden, tp)
    flat_labels = labels.t().reshape(-1)
    return _OutputCrossEntropy.apply(hidden.flatten(0, 1), weight, flat_labels, tp, vocab_size, chunk, z_loss)
