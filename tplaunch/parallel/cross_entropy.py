"""The output layer and vocab-parallel cross-entropy in one, chunk by chunk.

Each tp rank has the logits of its vocabulary slice only, and of one chunk of tokens at a time: whole logits never
exist, on any rank, in any precision. Two all-reduces a chunk ([tokens] of maxima, [2, tokens] of sums) join the
slices (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Where the gradient of the output matrix is added up in place,
all gradients are made in the forward pass, while the logits exist (Liger's fused linear cross-entropy, Hsu et al. 2024,
arXiv 2410.10989). Elsewhere the backward pass computes them again, which costs one more output matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tplaunch.parallel.accumulator import Accumulator
from tplaunch.parallel.collectives import enter_region, start_all_reduce, wait
from tplaunch.parallel.layers import accumulator
from tplaunch.parallel.mesh import TensorParallel
from tplaunch.parallel.split_backward import wanted
from tplaunch.torch_private import assert_soon

IGNORE = -100  # label of a token that does not count, as in torch.nn.functional.cross_entropy


class _OutputCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, columns: _Columns, scale: float, training: bool
    ) -> Tensor:
        total = accumulator(weight) if training else None
        grad_hidden = None if total is None else torch.empty_like(hidden)
        losses, log_z = (hidden.new_empty(labels.shape, dtype=columns.dtype) for _ in range(2))
        for part in columns.chunks(len(labels)):
            logits, slope = columns.logits(hidden[part], weight)
            target = columns.at_labels(logits, labels[part])
            # A slice of nothing but padding has no maximum; a finite stand-in keeps NaN out.
            top = logits.amax(-1).clamp_min(torch.finfo(columns.dtype).min)
            exponentials = logits.sub_(top.unsqueeze(-1)).exp_()
            log_z[part], target = columns.join(top, exponentials.sum(-1), target)
            counted = labels[part] != IGNORE
            losses[part] = torch.where(counted, log_z[part] - target + columns.z_loss * log_z[part].square(), 0.0)
            if grad_hidden is not None and total is not None:
                probabilities = exponentials.mul_((top - log_z[part]).exp().unsqueeze(-1))
                grad = columns.gradient(probabilities, slope, log_z[part], labels[part], scale).to(weight.dtype)
                torch.matmul(grad, weight, out=grad_hidden[part])
                total.add_product(grad.t(), hidden[part])
        ctx.columns, ctx.scale, ctx.fused = columns, scale, grad_hidden is not None
        ctx.save_for_backward(*([grad_hidden] if grad_hidden is not None else [hidden, weight, labels, log_z]))
        return losses.sum(0, keepdim=True, dtype=torch.float64).to(columns.dtype) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused:
            # What was added to the matrix's gradient is right for the loss itself only.
            assert_soon(grad == 1, "the loss must be where the backward pass begins: give its factor as `scale`")
            return ctx.saved_tensors[0], None, None, None, None, None
        hidden, weight, labels, log_z = ctx.saved_tensors
        columns = ctx.columns
        need_hidden, need_weight = wanted(ctx, 0, 1)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Several chunks are summed in the accumulate dtype: bf16 would lose the small ones.
        total = Accumulator(torch.empty_like(weight, dtype=columns.dtype)) if need_weight else None
        for part in columns.chunks(len(labels)):
            logits, slope = columns.logits(hidden[part], weight)
            probabilities = logits.sub_(log_z[part].unsqueeze(-1)).exp_()
            grad_logits = columns.gradient(probabilities, slope, log_z[part], labels[part], grad * ctx.scale)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.matmul(grad_logits, weight, out=grad_hidden[part])
            if total is not None:
                total.add_product(grad_logits.t(), hidden[part])
        grad_weight = None if total is None else total.total.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


@dataclass(frozen=True)
class _Columns:
    """This rank's columns of the logits, and what is computed of them for a chunk of tokens.

    Args:
        tp: the group.
        rows: columns of a slice, which are the output matrix's rows.
        vocab_size: columns of all slices that are not padding.
        chunk: tokens whose logits exist at a time.
        z_loss: weight of log(Z)^2.
        softcap: c, where logits are c tanh(logit / c).
        dtype: of logits and losses.
    """

    tp: TensorParallel
    rows: int
    vocab_size: int
    chunk: int
    z_loss: float
    softcap: float | None
    dtype: torch.dtype

    def chunks(self, tokens: int) -> list[slice]:
        """The chunks of so many tokens."""
        return [slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def logits(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """[tokens, rows], -inf for padding; and their derivative by what they were before the soft cap, if any."""
        logits, slope = (hidden @ weight.t()).to(self.dtype), None
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(self.softcap)
        logits[:, max(0, self.vocab_size - self.tp.rank * self.rows) :] = -torch.inf
        return logits, slope

    def at_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logit of each token's label, [tokens]; 0 where another rank has it."""
        column, mine = self._place(labels)
        return torch.where(mine, logits.gather(-1, column).squeeze(-1), 0.0)

    def join(self, top: Tensor, local_sum: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """log Z and the label's logit of each token over all slices, [tokens], from each slice's largest logit, sum of
        exponentials of logits less that, and label's logit."""
        if self.tp.size == 1:
            return top + local_sum.log(), target
        highest = wait(start_all_reduce(top, self.tp, "max"))
        sums = torch.stack([local_sum * (top - highest).exp(), target])
        local_sum, target = wait(start_all_reduce(sums, self.tp)).unbind(0)
        return highest + local_sum.log(), target

    def gradient(
        self, probabilities: Tensor, slope: Tensor | None, log_z: Tensor, labels: Tensor, scale: Tensor | float
    ) -> Tensor:
        """Gradient of the scaled loss with respect to the logits before the soft cap, in the memory of the
        probabilities."""
        counted = (labels != IGNORE).to(self.dtype) * scale
        column, mine = self._place(labels)
        gradient = probabilities.mul_((counted * (1 + 2 * self.z_loss * log_z)).unsqueeze(-1))
        gradient.scatter_add_(-1, column, torch.where(mine, -counted, 0.0).unsqueeze(-1))
        return gradient if slope is None else gradient.mul_(slope)

    def _place(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's column here, [tokens, 1], and whether it is one of these, [tokens]."""
        column = labels - self.tp.rank * self.rows
        return column.clamp(0, self.rows - 1).unsqueeze(-1), (column >= 0) & (column < self.rows)


def output_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp: TensorParallel,
    vocab_size: int,
    chunk: int = 1024,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden weight^T) against labels, scaled.

    Args:
        hidden: [s or s/tp, b, h], the output of the final norm.
        weight: [padded vocab/tp, h], this rank's rows of the output matrix.
        labels: int64 [b, s]; `IGNORE` where a token does not count.
        tp: the group; its sequence_parallel says whether `hidden` is a slice.
        vocab_size: real size of the vocabulary; padded columns get no probability.
        chunk: tokens whose logits exist at a time.
        z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311, section 5).
        softcap: c, where logits are c tanh(logit / c) (Gemma 2, arXiv 2408.00118).
        scale: factor of the sum. Backward passes must begin at the loss: nothing else may scale it.

    Returns:
        fp32 [1] (fp64 for fp64 input), the same on every tp rank.
    """
    hidden = enter_region(hidden, tp).flatten(0, 1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    columns = _Columns(tp, weight.shape[0], vocab_size, chunk, z_loss, softcap, dtype)
    labels = labels.t().reshape(-1)
    return _OutputCrossEntropy.apply(hidden, weight, labels, columns, scale, torch.is_grad_enabled())
