"""What context parallelism exchanges for the attention of a block (`tplaunch.parallel.context`), and how long that
takes.

All-gather: keys and values are gathered in the forward pass, while queries are projected, and again in the backward
pass, beside the gradients of the output projection; their gradients go back beside those of the queries' projection
(Llama 3, arXiv 2407.21783, section 3.3.2). Ulysses: heads change hands for tokens, and back (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from tplaunch.plan.case import Case
from tplaunch.plan.communication import Kind, axis_group, collective_seconds
from tplaunch.plan.compute import Passes
from tplaunch.plan.memory import exchanged_heads, gathered_keys, head_bytes, local_heads
from tplaunch.recipe.schema import Part


class Exchange(NamedTuple):
    """One kind of exchange of a block, for one microbatch.

    Args:
        what: is exchanged.
        kind: the collective.
        bytes: of one call (`communication.Traffic`).
        seconds: of one call.
        forward, backward: calls in each pass.
        hidden: seconds of them all that computation hides.
        again: the part with which it is made again in the backward pass; None: it never is.
    """

    what: str
    kind: Kind
    bytes: float
    seconds: float
    forward: int
    backward: int
    hidden: tuple[float, float] = (0.0, 0.0)
    again: Part | None = None

    def exposed(self) -> tuple[float, float]:
        """Seconds that nothing hides, forward and backward."""
        return self.forward * self.seconds - self.hidden[0], self.backward * self.seconds - self.hidden[1]


class ContextTraffic(NamedTuple):
    """The exchanges of a block for one microbatch."""

    exchanges: tuple[Exchange, ...] = ()

    @property
    def forward(self) -> float:
        """Seconds that nothing hides."""
        return sum(exchange.exposed()[0] for exchange in self.exchanges)

    @property
    def backward(self) -> float:
        """Seconds that nothing hides."""
        return sum(exchange.exposed()[1] for exchange in self.exchanges)

    def again_seconds(self, made: Collection[Part]) -> float:
        """Seconds of those that parts bring with them when they are made again, which nothing hides."""
        return sum(exchange.seconds for exchange in self.exchanges if exchange.again in made)


def context_traffic(case: Case, queries: Passes, output: Passes) -> ContextTraffic:
    """The exchanges of a block.

    Args:
        queries, output: the projections before and after attention, which hide what is gathered.
    """
    if case.topology.cp == 1:
        return ContextTraffic()
    if case.recipe.topology.cp_kind == "ulysses":
        return ContextTraffic(_heads_for_tokens(case))
    return ContextTraffic(_keys_and_values(case, queries, output))


def _keys_and_values(case: Case, queries: Passes, output: Passes) -> tuple[Exchange, ...]:
    size, group = gathered_keys(case), axis_group(case, "cp")
    gather, scatter = (collective_seconds(case, group, kind, size) for kind in ("all-gather", "all-to-all"))
    hidden = min(gather, queries.forward), min(gather, output.total - output.forward)
    back = 0.0, min(scatter, queries.total - queries.forward)
    return (
        Exchange("keys and values", "all-gather", size, gather, 1, 1, hidden),
        Exchange("their gradients", "all-to-all", size, scatter, 0, 1, back),
    )


def _heads_for_tokens(case: Case) -> tuple[Exchange, ...]:
    group, heads = axis_group(case, "cp"), local_heads(case)[0]
    turned: Part = "rotary" if case.model.qk_norm or case.model.position == "rope" else "qkv"
    found = []
    for what, count, again in (("heads", exchanged_heads(case), turned), ("tokens", heads, "core_attention")):
        size = case.tokens * count * head_bytes(case)
        seconds = collective_seconds(case, group, "all-to-all", size)
        found.append(Exchange(what, "all-to-all", size, seconds, 1, 1, again=again))
    return tuple(found)
