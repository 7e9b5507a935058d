"""Muon: momentum, orthogonalised by Newton-Schulz, for hidden matrices (Jordan 2024,
https://kellerjordan.github.io/posts/muon; scaled as Moonlight's, arXiv 2502.16982).

Each matrix is orthogonalised whole, by one of the ranks that share it (`tplaunch.spec.muon`), so that the update is the
same on any topology. Newton-Schulz makes differences of rounding in small singular values larger, by up to 3.4445 a
step: 500 times in five.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tplaunch.spec.muon import CHUNK, STEPS, Matrix, Piece, Round, scale
from tplaunch.spec.slices import Rectangle

_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan's coefficients
_EPS = 1e-7


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values of each matrix near 1, in the dtype that it has.

    Args:
        matrices: [n, rows, columns].
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


@dataclass(frozen=True)
class HeldMatrix:
    """What this rank keeps of one parameter.

    Args:
        weight: its rectangle, plain; may be empty.
        place: where that lies in the parameter.
        shape: rows and columns of what is orthogonalised by itself.
    """

    weight: nn.Parameter
    place: Rectangle
    shape: tuple[int, int]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled decay. After a step a weight's gradient is the update that was made of
    it, before rate and decay.

    Args:
        groups: parameters by group, each with its `lr` and `weight_decay`; empty shards may be left out.
        momentum: decay of the running mean of gradients.
        held: every parameter of this rank's stages, in the order that `rounds` were made with.
        rounds: who orthogonalises what.
        rank: this one's place in the pipeline stage.
        group: the stage's ranks; None: there is no other.
        dtype: that matrices are orthogonalised in, and sent in.
        momentum_dtype: that the running means are kept in; default: the weights', in which they are computed.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        momentum: float,
        held: Sequence[HeldMatrix],
        rounds: Sequence[Round],
        rank: int,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, {"momentum": momentum})
        self._momentum_dtype = momentum_dtype
        for each in held:
            assert each.weight.shape == (len(each.place.rows), len(each.place.columns)), "spec.slices is wrong"
        self._held = held
        self._scales = {held.weight: scale(*held.shape) for held in self._held}
        self._rounds = [_Exchange(each, rank, held, group, dtype) for each in rounds]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight from its gradient; every rank of the stage must call it."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(weight, dtype=self._momentum_dtype)
                kept = state["momentum_buffer"]
                mean = kept.to(weight.dtype).lerp_(weight.grad, 1 - group["momentum"])
                weight.grad.lerp_(mean, group["momentum"])
                if mean is not kept:
                    kept.copy_(mean)
        for exchange in self._rounds:
            exchange.run()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad.mul_(self._scales[weight])
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(weight.grad, alpha=-group["lr"])


class _Exchange:
    """One round: gradients become orthogonalised updates, in place."""

    def __init__(
        self,
        plan: Round,
        rank: int,
        held: Sequence[HeldMatrix],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        self.held, self.group, self.dtype = held, group, dtype
        self.size = 1 if group is None else group.size()
        self.matrices = plan.matrices
        self.given, self.gathered = plan.given(rank), plan.gathered(rank)
        self.scattered, self.returned = plan.scattered(rank), plan.returned(rank)
        self.load: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # size -> matrices of it
        for number in plan.load(rank):
            self.load[self.matrices[number].rows, self.matrices[number].columns].append(number)

    def run(self) -> None:
        """Gather, orthogonalise, scatter."""
        stacks = self._gather()
        for stack in stacks:
            for some in stack.split(max(1, CHUNK // stack[0].numel())):
                some.copy_(orthogonalize(some))
        self._scatter(stacks)

    def _gather(self) -> list[Tensor]:
        """The matrices that this rank orthogonalises, those of one size together: [n, rows, columns] each."""
        come = self._move([self._own(piece) for piece in self.given], self.given, self.gathered)
        stacks = [come.new_empty(len(numbers), *size) for size, numbers in self.load.items()]
        whole = self._by_number(stacks)
        for piece, values in _split(come, self.gathered):
            _part(whole[piece.matrix], self.matrices[piece.matrix], piece).copy_(values)
        return stacks

    def _scatter(self, stacks: list[Tensor]) -> None:
        """Send back what has become of them, and take this rank's parts of others; `stacks` is emptied."""
        whole = self._by_number(stacks)
        parts = [_part(whole[piece.matrix], self.matrices[piece.matrix], piece) for piece in self.scattered]
        stacks.clear()
        whole.clear()
        come = self._move(parts, self.scattered, self.returned)
        for piece, values in _split(come, self.returned):
            self._own(piece).copy_(values)

    def _by_number(self, stacks: list[Tensor]) -> dict[int, Tensor]:
        """The matrices of stacks, one for each size, by their numbers in the round."""
        pairs = (zip(numbers, stack, strict=True) for numbers, stack in zip(self.load.values(), stacks, strict=True))
        return {number: matrix for pair in pairs for number, matrix in pair}

    def _own(self, piece: Piece) -> Tensor:
        """A piece of this rank's gradients."""
        held = self.held[self.matrices[piece.matrix].parameter]
        assert held.weight.grad is not None
        first = piece.of.rows.start - held.place.rows.start
        return held.weight.grad[first : first + len(piece.of.rows)]

    def _move(self, parts: list[Tensor], sent: list[Piece], received: list[Piece]) -> Tensor:
        """Send pieces to the ranks that they are for; what has come, flat, in the order of `received`. `parts` is
        emptied, so that what they are part of may go."""
        theirs, ours = self._counts(received), self._counts(sent)
        flat = torch.empty(sum(ours), dtype=self.dtype, device=self.held[0].weight.device)
        for (_, values), part in zip(_split(flat, sent), parts, strict=True):
            values.copy_(part)
        parts.clear()
        if self.size == 1:
            return flat
        come = flat.new_empty(sum(theirs))
        dist.all_to_all_single(come, flat, theirs, ours, group=self.group)
        return come

    def _counts(self, pieces: list[Piece]) -> list[int]:
        """Elements from or to each rank."""
        counts = [0] * self.size
        for piece in pieces:
            counts[piece.rank] += piece.of.size
        return counts


def _part(whole: Tensor, matrix: Matrix, piece: Piece) -> Tensor:
    """A piece of a matrix."""
    rows, columns = piece.of
    first = rows.start - matrix.first_row
    return whole[first : first + len(rows), columns.start : columns.stop]


def _split(flat: Tensor, pieces: list[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Pieces that lie one after the other, as matrices."""
    for piece, values in zip(pieces, flat.split([piece.of.size for piece in pieces]), strict=True):
        yield piece, values.view(len(piece.of.rows), len(piece.of.columns))
