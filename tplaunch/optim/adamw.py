"""AdamW whose moments, or gradients, are kept in fewer bytes than the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_PIECE = 1 << 18  # elements that are widened at a time: they stay in a core's cache
_GPU_PIECE = 1 << 24  # the same on a GPU: 64 MiB, which a launch of a kernel is small against


class _Part(NamedTuple):
    """Elements of a weight, and what belongs to them: 1-D views."""

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor


class NarrowAdamW(torch.optim.AdamW):
    """AdamW as torch's fused kernel computes it, in the weights' dtype, piece by piece; moments are then rounded to the
    nearest number of theirs (bf16 for both moments: DeepSeek-V3, arXiv 2412.19437, section 3.3.2, which says no
    rounding of another kind).

    Args:
        groups: parameters by group, as torch takes them.
        lr, betas, eps: as torch's.
        moments: dtype that they are kept in.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, moments: torch.dtype
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if weights:
            self._updates = torch.zeros((), dtype=torch.float32, device=weights[0].device)
        for weight in weights:
            mean, square = (torch.zeros_like(weight, dtype=moments) for _ in range(2))
            self.state[weight] = {"step": self._updates, "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight from its gradient; not at all where `found_inf` is set, as torch's own does."""
        divisor, skipped = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not self.state:
            return
        for group in self.param_groups:
            for parts in self._batches(group["params"]):
                self._update(parts, group, divisor, skipped)
        self._updates.add_(1 if skipped is None else 1 - skipped)

    def _batches(self, weights: list[Tensor]) -> Iterator[list[_Part]]:
        """Parts of weights in lists that together are no larger than a piece."""
        some: list[_Part] = []
        size = 0
        for weight in weights:
            most = _GPU_PIECE if weight.is_cuda else _PIECE
            state = self.state[weight]
            assert weight.grad is not None
            tensors = (weight.detach(), weight.grad, state["exp_avg"], state["exp_avg_sq"])
            for views in zip(*(tensor.reshape(-1).split(most) for tensor in tensors), strict=True):
                if some and size + views[0].numel() > most:
                    yield some
                    some, size = [], 0
                some.append(_Part(*views))
                size += views[0].numel()
        if some:
            yield some

    def _update(
        self, parts: list[_Part], group: dict[str, Any], divisor: Tensor | None, skipped: Tensor | None
    ) -> None:
        wide = [_Part(part.weight, *(tensor.to(part.weight.dtype) for tensor in part[1:])) for part in parts]
        first, second = group["betas"]
        adamw(
            [part.weight for part in wide],
            [part.gradient for part in wide],
            [part.mean for part in wide],
            [part.square for part in wide],
            [],
            [self._updates.clone() for _ in wide],  # which the kernel counts up
            fused=True,
            grad_scale=divisor,
            found_inf=skipped,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for part, made in zip(parts, wide, strict=True):
            if made.mean is not part.mean:
                part.mean.copy_(made.mean)
                part.square.copy_(made.square)
