"""What a transformer block makes again in its backward pass instead of keeping it, part by part.

A part that is made again hands on what it gives without keeping it; where the backward pass needs that, the part runs
once more, on what it read. Parts that are made again and follow each other are made again as a chain. (Megatron's
--recompute-modules with output-discarding checkpoints; Chen et al. 2016, arXiv 1604.06174.)

`block_steps` is a block as the trainer runs it, `kept` what follows from it for a set of parts: the planner counts by
it, and the trainer's block is held to it by test.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Literal, NamedTuple

from tplaunch.recipe.schema import Model, Part, Training

# In the order of a block.
PARTS: dict[Part, str] = {
    "norm": "all norms of the block but those of heads, and those of latents; what they read is kept, and a number or "
    "two a token",
    "qkv": "the projection to queries, keys and values; in a model that rotates, but has no norms of heads, it saves "
    "nothing by itself: what is kept are the rotated ones; with latent attention, by itself the latents",
    "rotary": "norms of heads and rotation; without norms of heads it saves nothing by itself, but with qkv: the "
    "projection would be kept instead, of latent attention a smaller one: all heads share a part of their keys",
    "core_attention": "softmax(q k^T) v, and the statistics of its softmax",
    "attention_output": "the projection after attention, and its sum with the block's input; with parallel_residual it "
    "saves nothing: nobody needs the sum",
    "dispatch": "tokens copied to their experts, and sent there where these are on other ranks; the router itself is "
    "never made again: it chooses once",
    "gate_up": "the MLP's first projections; with experts those of all experts, the shared ones among them, as below",
    "activation": "SwiGLU or GELU",
    "down": "the MLP's last projection, and its sum; it saves something in a model with post_norms alone, and not with "
    "experts: the next block's input is always kept",
}
ALL: frozenset[Part] = frozenset(PARTS)
CHEAP: frozenset[Part] = frozenset(("norm", "rotary", "activation"))  # element-wise: no matmul, no communication


class Step(NamedTuple):
    """A part at one place of a block, by the names of tensors.

    Args:
        part: which.
        reads: what it is computed from.
        gives: what it makes; `softmax` are the statistics of attention's.
        needs: of these, what its backward pass needs, but for norms' statistics.
    """

    part: Part
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    needs: tuple[str, ...]


def chosen(training: Training, layer: int) -> frozenset[Part]:
    """The parts that a recipe has a block, by its global number, make again; none while `auto` is not decided
    (`tplaunch.plan.recomputation`)."""
    recompute = training.recompute
    if isinstance(recompute, str):
        return {"none": frozenset[Part](), "cheap": CHEAP, "full": ALL, "auto": frozenset[Part]()}[recompute]
    if recompute.every is not None:
        return ALL if layer % recompute.every == 0 else frozenset()
    if recompute.again is not None:
        return frozenset(recompute.again)
    return ALL - frozenset(recompute.save or ())


def sets(training: Training, layers: range) -> dict[frozenset[Part], int]:
    """How many of some blocks make again which parts."""
    if layers and (isinstance(training.recompute, str) or training.recompute.every is None):
        return {chosen(training, layers[0]): len(layers)}
    return Counter(chosen(training, layer) for layer in layers)


def effective(model: Model, parts: frozenset[Part], *, experts: bool = False) -> frozenset[Part]:
    """Of these parts those that save something, see `PARTS`; the others are not made again.

    Args:
        experts: of a block with experts, as below.
    """
    return _effective(_kind(model, experts=experts), parts)


class _Kind(NamedTuple):
    """What of a model its steps depend on."""

    norms_heads: bool
    rotates: bool
    norms_before: bool
    norms_after: bool
    parallel: bool
    experts: bool
    shared: bool
    latent: Literal["", "keys", "all"]  # what is made of latents


def _kind(model: Model, *, experts: bool) -> _Kind:
    rotates = model.position == "rope"
    shared = experts and model.moe is not None and model.moe.shared_ffn_hidden_size is not None
    latent: Literal["", "keys", "all"] = ""
    if model.latent is not None:
        latent = "keys" if model.latent.q_rank is None else "all"
    norms = model.pre_norms, model.post_norms
    return _Kind(model.qk_norm, rotates, *norms, model.parallel_residual, experts, shared, latent)


def _effective(kind: _Kind, parts: frozenset[Part]) -> frozenset[Part]:
    norms_heads, rotates, _, norms_after, parallel, experts, _, latent = kind
    without: set[Part] = set() if norms_after and not experts else {"down"}
    if not experts:
        without.add("dispatch")
    if parallel:
        without.add("attention_output")
    if not norms_heads and not latent and not (rotates and {"qkv", "rotary"} <= parts):
        without |= {"qkv", "rotary"} if rotates else {"rotary"}
    return parts - without


def block_steps(model: Model, *, experts: bool = False) -> tuple[Step, ...]:
    """The parts of a block in order, from `input` to `output`.

    `turned` are queries, keys and values (with norms of heads: queries and keys) after rotary; a model without rotation
    and norms of heads attends with what was `projected`. With latent attention, `latent` are the latents that
    keys and values, and mostly queries, are made of. `dispatched`, `inside` and `activated` have a row for each token
    and expert that it goes to; `shared_inside` and `shared_activated` are of shared experts. `routing` is what the
    router keeps, which is never made again: small (`tplaunch.spec.experts`).
    """
    return _steps(_kind(model, experts=experts))


@cache
def _steps(kind: _Kind) -> tuple[Step, ...]:
    norms_heads, rotates, norms_before, norms_after, parallel, experts, shared, latent = kind
    turns = norms_heads or rotates
    heads = ("turned", "projected") if norms_heads else ("turned",) if turns else ("projected",)
    rotary = [Step("rotary", ("projected",), ("turned",), ("projected",) if norms_heads else ())] if turns else []
    after: tuple[Step, ...] = (Step("attention_output", ("input", "attended"), ("middle",), ("attended",)),)
    inside: tuple[str, ...] = ("inside", "shared_inside") if shared else ("inside",)
    activated: tuple[str, ...] = ("activated", "shared_activated") if shared else ("activated",)
    end: tuple[Step, ...] = (Step("down", ("middle", *activated), ("output",), activated),)
    if norms_after:
        after = (
            Step("attention_output", ("attended",), ("attention_made",), ("attended",)),
            Step("norm", ("input", "attention_made"), ("middle",), ("attention_made",)),
        )
        end = (
            Step("down", activated, ("mlp_made",), activated),
            Step("norm", ("middle", "mlp_made"), ("output",), ("mlp_made",)),
        )
    read, beside, before, between = "input", "middle", [], []
    if norms_before:
        read, beside, normed = "normed", "middle_normed", "input" if parallel else "middle"
        before = [Step("norm", ("input",), ("normed",), ("input",))]
        between = [Step("norm", (normed,), ("middle_normed",), (normed,))]
    projection = [Step("qkv", (read,), ("projected",), (read,)), *rotary]
    if latent:
        queries = ("queries",) if latent == "keys" else ()
        projection = [
            *(Step("qkv", (read,), (name,), (read,)) for name in (*queries, "latent")),
            Step("norm", ("latent",), ("latent_normed",), ("latent",)),
            Step("qkv", ("latent_normed",), ("projected",), ("latent_normed",)),
            Step("rotary", (*queries, "projected"), ("turned",), ()),
        ]
    entered: tuple[str, ...] = (beside,)
    dispatch = []
    if experts:
        entered = ("dispatched", beside) if shared else ("dispatched",)
        dispatch = [Step("dispatch", (beside,), ("dispatched",), (beside, "routing"))]
    return (
        *before,
        *projection,
        Step("core_attention", heads, ("attended", "softmax"), (*heads, "attended", "softmax")),
        *after,
        *between,
        *dispatch,
        Step("gate_up", entered, inside, entered),
        Step("activation", inside, activated, inside),
        *end,
    )


class Kept(NamedTuple):
    """What becomes of a block's tensors.

    Args:
        kept: names of those that are kept, `input` among them.
        made: the steps that run again, in order.
    """

    kept: frozenset[str]
    made: tuple[Step, ...]


def kept(model: Model, parts: frozenset[Part], needed: frozenset[str] | None = None, *, experts: bool = False) -> Kept:
    """What a block keeps for its backward pass, and what runs again there.

    Args:
        parts: what is made again.
        needed: tensors to be had; default: all that the backward pass needs.
    """
    return _kept(_kind(model, experts=experts), parts, needed)


@cache
def _kept(kind: _Kind, parts: frozenset[Part], needed: frozenset[str] | None) -> Kept:
    steps, parts = _steps(kind), _effective(kind, parts)
    again = {name: step for step in steps if step.part in parts for name in step.gives}
    open_ = list(needed or {name for step in steps for name in step.needs})
    stays, made = set(), set()
    while open_:
        name = open_.pop()
        if name not in again:
            stays.add(name)
        elif again[name] not in made:
            made.add(again[name])
            open_ += again[name].reads
    return Kept(frozenset(stays), tuple(step for step in steps if step in made))
