"""What context parallelism exchanges for the attention of a block, and how long that takes.

All-gather: keys and values are gathered in the forward pass, while queries are projected, and again in the backward
pass, which then reduces and scatters their gradients (Llama 3, arXiv 2407.21783, section 3.3.2). Ulysses: queries,
keys, values and the output change hands from tokens to heads and back, in all-to-alls, and so do their gradients
(arXiv 2309.14509).
"""

from __future__ import annotations

from typing import NamedTuple

from tplaunch.plan.case import Case
from tplaunch.plan.communication import Kind, axis_group, collective_seconds
from tplaunch.plan.memory import gathered_keys, head_bytes, local_heads


class Exchange(NamedTuple):
    """One kind of exchange of a block, for one microbatch.

    Args:
        what: is exchanged.
        kind: the collective.
        bytes: of one call (`communication.Traffic`).
        seconds: of one call.
        forward, backward: calls in each pass.
        again: calls where attention is made again in the backward pass.
    """

    what: str
    kind: Kind
    bytes: float
    seconds: float
    forward: int
    backward: int
    again: int


class ContextTraffic(NamedTuple):
    """The exchanges of a block for one microbatch, and the seconds of them that no computation hides.

    Args:
        exchanges: each kind.
        forward, backward: seconds that are not hidden.
        again: seconds that attention costs if it is made again.
    """

    exchanges: tuple[Exchange, ...] = ()
    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0


def context_traffic(case: Case, beside_gather: float) -> ContextTraffic:
    """The exchanges of a block.

    Args:
        beside_gather: seconds of the queries' projection, which hides the gathering of keys and values.
    """
    cp = case.topology.cp
    if cp == 1:
        return ContextTraffic()
    exchanges = _heads_for_tokens(case) if case.recipe.topology.cp_kind == "ulysses" else _keys_and_values(case)
    forward, backward, again = (
        sum(getattr(exchange, when) * exchange.seconds for exchange in exchanges)
        for when in ("forward", "backward", "again")
    )
    if case.recipe.topology.cp_kind == "allgather":
        forward = max(0.0, forward - beside_gather)
    return ContextTraffic(exchanges, forward, backward, again)


def _keys_and_values(case: Case) -> tuple[Exchange, ...]:
    size = gathered_keys(case)
    group = axis_group(case, "cp")
    gather, scatter = (collective_seconds(case, group, kind, size) for kind in ("all-gather", "reduce-scatter"))
    return (
        Exchange("keys and values", "all-gather", size, gather, 1, 1, 1),
        Exchange("their gradients", "reduce-scatter", size, scatter, 0, 1, 0),
    )


def _heads_for_tokens(case: Case) -> tuple[Exchange, ...]:
    group, (heads, kv_heads) = axis_group(case, "cp"), local_heads(case)
    sizes = {"queries, outputs": heads, "keys and values": max(kv_heads, case.topology.cp)}
    found = []
    for what, held in sizes.items():
        size = case.tokens * held * head_bytes(case)
        seconds = collective_seconds(case, group, "all-to-all", size)
        found.append(Exchange(what, "all-to-all", size, seconds, 2, 2, 2))
    return tuple(found)
