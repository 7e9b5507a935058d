"""The output layer and vocab-parallel cross-entropy in one, chunk by chunk.

Each tp rank has the logits of its vocabulary slice only, and of one chunk of tokens at a time: whole logits never
exist, on any rank, in any precision. Two all-reduces a chunk ([tokens] of maxima, [2, tokens] of sums) join the
slices (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Where the gradient of the output matrix is added up in place,
or it has none, all gradients are made in the forward pass, while the logits exist (Liger's fused linear cross-entropy,
Hsu et al. 2024, arXiv 2410.10989). Elsewhere the backward pass computes them again, which costs one more output matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tplaunch.kernels import fused
from tplaunch.kernels.matmul import matmul_into
from tplaunch.parallel.accumulator import Accumulator, widened_matmul
from tplaunch.parallel.collectives import enter_region, start_all_reduce, wait
from tplaunch.parallel.linear import accumulator
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
        frozen = training and hidden.requires_grad and not weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if frozen or total is not None else None
        losses, log_z = (hidden.new_empty(labels.shape, dtype=columns.dtype) for _ in range(2))
        for part in columns.chunks(len(labels)):
            logits = columns.logits(hidden[part], weight, labels[part])
            log_z[part], target = columns.join(*logits.measure())
            counted = labels[part] != IGNORE
            losses[part] = torch.where(counted, log_z[part] - target + columns.z_loss * log_z[part].square(), 0.0)
            if grad_hidden is not None:
                grad = logits.gradient(log_z[part], scale, weight.dtype)
                matmul_into(grad_hidden[part], grad, weight)
                if total is not None:
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
            logits = columns.logits(hidden[part], weight, labels[part])
            grad_logits = logits.gradient(log_z[part], grad * ctx.scale, weight.dtype)
            if grad_hidden is not None:
                matmul_into(grad_hidden[part], grad_logits, weight)
            if total is not None:
                total.add_product(grad_logits.t(), hidden[part])
        grad_weight = None if total is None else total.total.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _Logits:
    """This rank's columns of one chunk's logits, by torch's operations in their memory.

    Args:
        logits: [tokens, rows], in fp32 (fp64 for fp64), as the matmul gives them.
        labels: int64 [tokens], of all columns.
        columns: what all chunks share.
    """

    def __init__(self, logits: Tensor, labels: Tensor, columns: _Columns) -> None:
        self.columns = columns
        self.labels = labels
        column = labels - columns.first
        self.column, self.mine = (
            column.clamp(0, columns.rows - 1).unsqueeze(-1),
            (column >= 0) & (column < columns.rows),
        )
        self._slope: Tensor | None = None  # of the soft cap
        if columns.softcap is not None:
            logits = logits.div_(columns.softcap).tanh_()
            self._slope = 1 - logits.square()
            logits.mul_(columns.softcap)
        logits[:, columns.real :] = -torch.inf
        self._values = logits
        self._top: Tensor | None = None  # values are exponentials of logits less this

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token [tokens]: its largest logit, the sum of exponentials of logits less that, and the logit of its
        label, 0 where another rank has it."""
        target = torch.where(self.mine, self._values.gather(-1, self.column).squeeze(-1), 0.0)
        # A slice of nothing but padding has no maximum; a finite stand-in keeps NaN out.
        self._top = self._values.amax(-1).clamp_min(torch.finfo(self._values.dtype).min)
        return self._top, self._values.sub_(self._top.unsqueeze(-1)).exp_().sum(-1), target

    def gradient(self, log_z: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Gradient of the scaled loss with respect to what the matmul gave, in a dtype; the last that is asked for.

        Args:
            log_z: of each token, over all columns.
        """
        factor, counted = self.columns.factors(self.labels, log_z, scale)
        if self._top is None:
            probabilities = self._values.sub_(log_z.unsqueeze(-1)).exp_()
        else:
            probabilities, factor = self._values, factor * (self._top - log_z).exp()
        gradient = probabilities.mul_(factor.unsqueeze(-1))
        gradient.scatter_add_(-1, self.column, torch.where(self.mine, -counted, 0.0).unsqueeze(-1))
        return (gradient if self._slope is None else gradient.mul_(self._slope)).to(dtype)


class _FusedLogits:
    """The same by one kernel each."""

    def __init__(self, logits: Tensor, labels: Tensor, columns: _Columns) -> None:
        self.columns, self.labels, self._values = columns, labels, logits

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        columns = self.columns
        return fused.measure_logits(self._values, self.labels - columns.first, columns.real, columns.softcap)

    def gradient(self, log_z: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
        columns = self.columns
        factors = columns.factors(self.labels, log_z, scale)
        labels = self.labels - columns.first
        return fused.logit_gradient(self._values, labels, log_z, *factors, columns.real, columns.softcap, dtype)


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

    @property
    def first(self) -> int:
        """The first of this rank's columns, among all."""
        return self.tp.rank * self.rows

    @property
    def real(self) -> int:
        """How many of this rank's columns are no padding."""
        return min(self.rows, max(0, self.vocab_size - self.first))

    def logits(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> _Logits | _FusedLogits:
        """The logits of a chunk."""
        kind = _FusedLogits if fused.fits(hidden) else _Logits
        return kind(widened_matmul(hidden, weight.t()), labels, self)

    def factors(self, labels: Tensor, log_z: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Of each token: what its probabilities are multiplied with for the gradient, and what is taken from that of
        its label."""
        counted = (labels != IGNORE).to(self.dtype) * scale
        return counted * (1 + 2 * self.z_loss * log_z), counted

    def join(self, top: Tensor, local_sum: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """log Z and the label's logit of each token over all slices, [tokens], from each slice's largest logit, sum of
        exponentials of logits less that, and label's logit."""
        if self.tp.size == 1:
            return top + local_sum.log(), target
        highest = wait(start_all_reduce(top, self.tp, "max"))
        sums = torch.stack([local_sum * (top - highest).exp(), target])
        local_sum, target = wait(start_all_reduce(sums, self.tp)).unbind(0)
        return highest + local_sum.log(), target


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


@torch.no_grad()
def score_labels(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp: TensorParallel,
    vocab_size: int,
    chunk: int = 1024,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, and whether no token is likelier than its label; see `output_cross_entropy`.

    Returns:
        Losses in fp32 (fp64 for fp64 input) and bool, both [b, s] and the same on every tp rank; 0 and True where a
        label is `IGNORE`.
    """
    hidden = enter_region(hidden, tp).flatten(0, 1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    columns = _Columns(tp, weight.shape[0], vocab_size, chunk, 0.0, softcap, dtype)
    shape, labels = labels.t().shape, labels.t().reshape(-1)
    losses, likeliest = hidden.new_empty(labels.shape, dtype=dtype), torch.empty_like(labels, dtype=torch.bool)
    for part in columns.chunks(len(labels)):
        top, local_sum, target = columns.logits(hidden[part], weight, labels[part]).measure()
        log_z, target = columns.join(top, local_sum, target)
        highest = top if tp.size == 1 else wait(start_all_reduce(top, tp, "max"))
        counted = labels[part] != IGNORE
        losses[part] = torch.where(counted, log_z - target, 0.0)
        likeliest[part] = ~counted | (target >= highest)
    return losses.view(shape).t(), likeliest.view(shape).t()
