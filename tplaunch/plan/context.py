"""What context parallelism exchanges for the attention of a block (`tplaunch.parallel.context`), and how long that
takes.

All-gather: keys and values are gathered in the forward pass, while queries are projected, and again in the backward
pass, beside the gradients of the output projection; their gradients go back beside those of the queries' projection
(Llama 3, arXiv 2407.21783, section 3.3.2). Ulysses: heads change hands for tokens, and back (arXiv 2309.14509).
"""

from __future__ import annotations

from tplaunch.plan.activations import attended_bytes, exchanged_bytes, gathered_keys
from tplaunch.plan.case import Case
from tplaunch.plan.communication import axis_group, collective_seconds
from tplaunch.plan.compute import Passes
from tplaunch.plan.exchange import Exchange, Exchanges


def context_traffic(case: Case, queries: Passes, output: Passes) -> Exchanges:
    """The exchanges of a block.

    Args:
        queries, output: the projections before and after attention, which hide what is gathered.
    """
    if case.topology.cp == 1:
        return Exchanges()
    if case.recipe.topology.cp_kind == "ulysses":
        return Exchanges(_heads_for_tokens(case))
    return Exchanges(_keys_and_values(case, queries, output))


def _keys_and_values(case: Case, queries: Passes, output: Passes) -> tuple[Exchange, ...]:
    size, group = gathered_keys(case), axis_group(case, "cp")
    gather, scatter = (collective_seconds(case, group, kind, size) for kind in ("all-gather", "all-to-all"))
    hidden = min(gather, queries.forward), min(gather, output.total - output.forward)
    back = 0.0, min(scatter, queries.total - queries.forward)
    return (
        Exchange("cp", group, "keys and values", "all-gather", size, gather, 1, 1, hidden),
        Exchange("cp", group, "their gradients", "all-to-all", size, scatter, 0, 1, back),
    )


def _heads_for_tokens(case: Case) -> tuple[Exchange, ...]:
    group = axis_group(case, "cp")
    turned = "turned" if case.model.qk_norm or case.model.position == "rope" else "projected"
    found = []
    for what, size, again in (
        ("heads", exchanged_bytes(case), turned),
        ("tokens", attended_bytes(case), "attended"),
    ):
        seconds = collective_seconds(case, group, "all-to-all", size)
        found.append(Exchange("cp", group, what, "all-to-all", size, seconds, 1, 1, again=again))
    return tuple(found)
