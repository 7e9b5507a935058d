"""A mixture of experts in place of the MLP: a router in fp32, and its experts; none of its tokens is dropped
(`tplaunch.parallel.experts`).

What the loss depends on does not depend on the topology: the auxiliary loss is counted over whole sequences, the
router's correction moves by the counts of whole steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from tplaunch.model.gated import gated
from tplaunch.model.mlp import MLP
from tplaunch.model.recompute import Recomputation, Run
from tplaunch.parallel.collectives import start_all_reduce, wait
from tplaunch.parallel.experts import (
    Groups,
    Routes,
    begin_combine,
    begin_dispatch,
    count,
    cut_sequence,
    dispatch_again,
    end_combine,
    end_dispatch,
    join_sequence,
    make_routes,
)
from tplaunch.parallel.function import Function
from tplaunch.parallel.grouped import add_group_bias, grouped_columns, grouped_row
from tplaunch.parallel.linear import for_weights, local, parameter
from tplaunch.parallel.mesh import ExpertParallel, Mesh, TensorParallel
from tplaunch.parallel.split_backward import saved, wanted
from tplaunch.recipe.schema import Experts as Spec
from tplaunch.recipe.schema import Model


class Router(nn.Module):
    """Logits of the experts, in fp32 (fp64 of fp64), whole on every tp rank, of which each has its own tokens."""

    correction: Tensor | None

    def __init__(self, model: Model, spec: Spec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.spec = spec
        self.weight = parameter((spec.experts, model.hidden_size), tp.mesh, (Replicate(),))
        self.bias = parameter((spec.experts,), tp.mesh, (Replicate(),)) if spec.biases else None
        has_correction = spec.bias_rate is not None
        self.register_buffer("correction", torch.zeros(spec.experts, dtype=torch.float32) if has_correction else None)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, h] -> [tokens, experts]."""
        logits = _WideLinear.apply(x, local(self.weight))
        return logits if self.bias is None else logits + local(self.bias)

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [tokens, experts] -> the experts of each token, int64 [tokens, k]."""
        spec = self.spec
        with torch.no_grad():
            if self.correction is not None:
                scores = scores + self.correction
            if spec.groups > 1:
                grouped = scores.unflatten(-1, (spec.groups, -1))
                best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(spec.top_groups, -1).indices
                left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
                scores = grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(-2)
            return scores.topk(spec.top_k, -1).indices

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """The weights of each token's experts, [tokens, k]."""
        weights = scores.gather(-1, chosen)
        if self.spec.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights if self.spec.scale == 1.0 else weights * self.spec.scale


class _WideLinear(Function):
    """x W^T in fp32, of narrower x and W, which alone are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(for_weights(ctx, 1, x), weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        need_x, need_weight = wanted(ctx, 0, 1)
        x, weight = saved(ctx, activations=need_weight)
        grad_x = (grad @ weight.to(grad.dtype)).to(weight.dtype) if need_x else None
        return grad_x, grad.t() @ x.to(grad.dtype) if need_weight else None


class ExpertLinear(nn.Module):
    """A matrix of each of a layer's experts, one below the other: [experts * h, f]."""

    def __init__(self, model: Model, spec: Spec, ranks: ExpertParallel, *, out: bool) -> None:
        super().__init__()
        hidden, ffn, mesh = model.hidden_size, spec.ffn_hidden_size, ranks.parameters
        self.weight = parameter((spec.experts * hidden, ffn), mesh, (Shard(0), Shard(1)))
        self.bias = None
        if spec.biases:
            across = Replicate() if out else Shard(1)
            self.bias = parameter((spec.experts, hidden if out else ffn), mesh, (Shard(0), across))


class Experts(nn.Module):
    """The experts of this rank: gated MLPs."""

    def __init__(self, model: Model, spec: Spec, ranks: ExpertParallel) -> None:
        super().__init__()
        assert model.activation in ("swiglu", "geglu", "swiglu_clamped")  # others are refused
        self.kind = model.activation
        self.sharers = ranks.tp.size  # ranks that share each expert
        self.gate, self.up, self.down = (ExpertLinear(model, spec, ranks, out=out) for out in (False, False, True))

    def forward(self, run: Run, rows: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """The rows of this rank's experts [rows, h] and their weights [rows] -> what the experts make of them, times
        these, [rows, h]; of a shared expert this rank's part."""
        gate, up = run("gate_up", partial(self.enter, groups=groups), rows)
        activated = run("activation", partial(gated, kind=self.kind), gate, up, weights)
        made = grouped_row(activated, groups, local(self.down.weight))
        if self.down.bias is None:
            return made
        # Each of them adds its part of what none of them cuts: FSDP2 wants a gradient on every rank.
        return add_group_bias(made, groups, local(self.down.bias) / self.sharers, weights)

    def enter(self, rows: Tensor, groups: Groups) -> tuple[Tensor, ...]:
        """Gate and up, [rows, f] each."""
        layers = (self.gate, self.up)
        made = grouped_columns(rows, groups, *(local(layer.weight) for layer in layers))
        if self.gate.bias is None:
            return made
        biases = [local(layer.bias) for layer in layers if layer.bias is not None]
        return tuple(add_group_bias(y, groups, bias) for y, bias in zip(made, biases, strict=True))


class MoE(nn.Module):
    """A layer with experts.

    Attributes:
        counts: int64 [experts], tokens of this rank that each expert got since `begin_step`.
        losses: fp64 [2], auxiliary loss and z-loss of this rank's tokens, summed over sequences likewise.
    """

    def __init__(self, model: Model, mesh: Mesh) -> None:
        super().__init__()
        assert model.moe is not None and mesh.experts is not None
        self.spec = spec = model.moe
        self.tp, self.cp, self.ranks = mesh.tp, mesh.cp, mesh.experts
        self.router = Router(model, spec, tp=mesh.tp)
        self.experts = Experts(model, spec, mesh.experts)
        shared = spec.shared_ffn_hidden_size
        self.shared = None if shared is None else MLP(model, mesh, ffn=shared, bias=False)
        self.loss_factor = 0.0
        self.counts: Tensor | None = None
        self.losses: Tensor | None = None

    def begin_step(self, loss_factor: float) -> None:
        """Forget what was counted.

        Args:
            loss_factor: of the router's losses of a sequence: 1 / (sequences of the global batch) makes their sum that
                batch's mean; times the loss scale.
        """
        self.loss_factor = loss_factor
        self.counts = self.losses = None

    def forward(self, run: Run, normed: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> the same: what the experts make of it."""
        cut = self.tp.size > 1 and not self.tp.sequence_parallel
        tokens = cut_sequence(normed, self.tp) if cut else normed
        x = tokens.flatten(0, 1)
        weights, routes = self._route(x, tokens.shape[1])
        dispatched = begin_dispatch(x, weights, routes)
        activated = None
        if self.shared is not None:  # while rows are under way
            activated = run("activation", self.shared.activate, run("gate_up", self.shared.enter, normed))
        rows, row_weights = end_dispatch(dispatched)
        if isinstance(run, Recomputation):
            run.note("dispatch", partial(dispatch_again, routes=routes), x, rows)
        combined = begin_combine(self.experts(run, rows, row_weights, routes.groups), routes)
        beside = None if activated is None or self.shared is None else self.shared.down(activated)
        made = end_combine(combined).view_as(tokens)
        if cut:
            made = join_sequence(made, self.tp, len(normed))
        return made if beside is None else made + beside

    def _route(self, x: Tensor, sequences: int) -> tuple[Tensor, Routes]:
        """Tokens [tokens, h] of some sequences -> the weights of each one's experts, [tokens, k], and the way there."""
        logits = self.router(x)
        scores = logits.softmax(-1) if self.spec.router == "softmax" else logits.sigmoid()
        chosen = self.router.choose(scores)
        routes = make_routes(chosen, self.spec.experts, self.ranks)
        weights = self.router.weigh(scores, chosen)
        if not torch.is_grad_enabled():
            return weights, routes
        self.counts = routes.counts if self.counts is None else self.counts + routes.counts
        if self.spec.aux_loss or self.spec.z_loss:
            losses = self._losses(logits, scores, chosen, sequences)
            noted = losses.detach().double()
            self.losses = noted if self.losses is None else self.losses + noted
            weights = _WithLoss.apply(weights, losses.sum() * self.loss_factor)
        return weights, routes

    def _losses(self, logits: Tensor, scores: Tensor, chosen: Tensor, sequences: int) -> Tensor:
        """This rank's part of the router's losses, summed over sequences: [2].

        The auxiliary loss of a sequence is alpha sum_i f_i P_i, f_i the part of its choices that went to expert i times
        the number of experts, P_i the mean of i's scores, which sum to one (DeepSeek-V3, arXiv 2412.19437, equations 17
        to 20); the z-loss is the mean of its tokens' squared logsumexp (ST-MoE, arXiv 2202.08906).
        """
        spec, experts = self.spec, self.spec.experts
        aux = z = logits.new_zeros(())
        length = len(logits) // sequences * self.tp.size * (1 if self.cp is None else self.cp.size)
        if spec.aux_loss:
            if spec.router == "sigmoid":
                scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            load = self._load(chosen, sequences).to(scores.dtype) * (experts / (spec.top_k * length))
            aux = (scores.view(-1, sequences, experts) * load).sum() * (spec.aux_loss / length)
        if spec.z_loss:
            z = logits.logsumexp(-1).square().sum() * (spec.z_loss / length)
        return torch.stack([aux, z])

    @torch.no_grad()
    def _load(self, chosen: Tensor, sequences: int) -> Tensor:
        """How often each expert was chosen in each whole sequence, int64 [sequences, experts]."""
        experts = self.spec.experts
        sequence = torch.arange(sequences, device=chosen.device).view(1, -1, 1)
        numbers = chosen.view(-1, sequences, chosen.shape[1]) + sequence * experts
        load = count(numbers.flatten(), sequences * experts)
        for ranks in (self.tp, self.cp):
            if ranks is not None and ranks.size > 1:
                load = wait(start_all_reduce(load, ranks))
        return load.view(sequences, experts)


class _WithLoss(Function):
    """Lies on the way of the weights, and lets the backward pass that comes by begin at a loss, too."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())
