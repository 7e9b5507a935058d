"""Latent attention (`tplaunch.model.latent`): the work of its projections, and what tensor parallelism exchanges of its
narrow vectors, which takes the place of the hidden states where a region begins."""

from __future__ import annotations

from tplaunch.plan.activations import latent_bytes, local_heads
from tplaunch.plan.case import Case
from tplaunch.plan.communication import Regions, axis_group, collective_seconds
from tplaunch.plan.compute import Passes, linear, pointwise, queries
from tplaunch.plan.exchange import Exchange, Exchanges


def latent_parts(case: Case) -> dict[str, Passes]:
    """What the block's steps of latent attention take, by what they give (`tplaunch.spec.recompute`); {} without it."""
    latent, heads, hidden = case.model.latent, local_heads(case)[0], case.model.hidden_size
    if latent is None:
        return {}
    own = case.tokens // case.topology.tp if case.sequence_parallel else case.tokens
    narrow = linear(case, own, latent.kv_rank + latent.rope_dim, hidden)
    wide = linear(case, case.tokens, heads * (latent.nope_dim + latent.value_dim), latent.kv_rank)
    parts = {"queries": queries(case)}
    if latent.q_rank is not None:
        narrow += linear(case, own, latent.q_rank, hidden)
        wide += queries(case)
        parts = {}
    size = latent_bytes(case)
    turned = case.tokens * heads * (2 * (latent.nope_dim + latent.rope_dim) + latent.value_dim) * case.compute_bytes
    return {
        **parts,
        "latent": narrow,
        "latent_normed": pointwise(case, 4 * size, 5 * size, kernels=5),  # normed, then put side by side
        "projected": wide,
        "turned": pointwise(case, 2 * turned, 2 * turned, kernels=8),
    }


def regions(case: Case, *, mlp: bool) -> Regions:
    """The tensor-parallel regions of a block.

    Args:
        mlp: whether it has one beside attention's.
    """
    norms_after, latent = case.model.post_norms, case.model.latent
    entered: tuple[str, ...] = ("projected",)
    if latent is not None:
        entered = () if latent.q_rank is not None else ("queries",)
    left: tuple[str, ...] = ("attention_made" if norms_after else "middle",)
    if mlp:
        entered, left = (*entered, "inside"), (*left, "mlp_made" if norms_after else "output")
    return Regions(entered, left)


def latent_traffic(case: Case) -> Exchanges:
    """With sequence parallelism narrow vectors are gathered before they are widened, and again in the backward pass,
    and their gradients scattered; without it their gradients are summed. Nothing hides it."""
    group = axis_group(case, "tp")
    if case.model.latent is None or group.size == 1:
        return Exchanges()
    size = latent_bytes(case) * (group.size if case.sequence_parallel else 1)
    if not case.sequence_parallel:
        seconds = collective_seconds(case, group, "all-reduce", size)
        return Exchanges((Exchange("tp", group, "latents", "all-reduce", size, seconds, 0, 1),))
    gather, scatter = (collective_seconds(case, group, kind, size) for kind in ("all-gather", "reduce-scatter"))
    return Exchanges(
        (
            Exchange("sp", group, "latents", "all-gather", size, gather, 1, 1, again="projected"),
            Exchange("sp", group, "latents", "reduce-scatter", size, scatter, 0, 1),
        )
    )
