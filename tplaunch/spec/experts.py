"""What the ranks of a layer with experts send each other, and when: the trainer's layer is held to it by test.

A rank has its own tokens: a part of its sequences, cut over tp whether or not that is done between layers, too. Each
token goes to `top_k` experts, and is sent there as often: a *row*. Over ep rows go to the ranks that hold their experts
and back; where each expert is shared by expert_tp ranks, all of these get each other's rows and sum what they make.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Axis = Literal["ep", "expert_tp", "tp", "cp"]


class Exchange(NamedTuple):
    """One kind of collective of a layer with experts, of one rank and one microbatch.

    Args:
        axis: "ep", "expert_tp", or "tp", "cp" of what belongs to whole sequences.
        what: what is sent.
        kind: the collective. Those of rows are uneven, as the router chooses; here they are balanced.
        bytes: of one call: of an all-to-all what the rank sends, its part for itself included; of an all-gather the
            whole; of an all-reduce the tensor.
        forward, backward: calls.
        again: calls where `dispatch` is made again (`tplaunch.spec.recompute`), beside these.
    """

    axis: Axis
    what: Literal["tokens", "rows", "weights", "counts", "load"]
    kind: Literal["all-to-all", "all-gather", "all-reduce"]
    bytes: float
    forward: int
    backward: int
    again: int = 0


def exchanges(
    *,
    tokens: int,
    sequences: int,
    hidden: int,
    experts: int,
    top_k: int,
    ep: int = 1,
    expert_tp: int = 1,
    tp: int = 1,
    cp: int = 1,
    sequence_parallel: bool = False,
    counts_sequences: bool = False,
    element: int = 2,
) -> list[Exchange]:
    """The collectives of one layer with experts and one microbatch, in the order of their first calls; none without
    ranks to talk to. Those of the shared experts are a dense MLP's.

    Args:
        tokens: of this rank, cut over cp and tp.
        sequences: of the microbatch.
        hidden: width of the residual stream.
        experts, top_k: of the layer.
        ep, expert_tp, tp, cp: ranks.
        sequence_parallel: tokens are cut over tp between layers, too.
        counts_sequences: there is an auxiliary loss, for which counts of whole sequences are needed.
        element: bytes of a number of the compute dtype.
    """
    rows, wide = tokens * top_k, max(element, 4)  # the router's numbers are fp32, or fp64
    found: list[Exchange] = []
    shared: tuple[tuple[Axis, int], ...] = (("tp", tp), ("cp", cp))
    if counts_sequences:
        load = 8.0 * sequences * experts
        found += [Exchange(axis, "load", "all-reduce", load, 1, 0) for axis, size in shared if size > 1]
    if ep > 1:
        found.append(Exchange("ep", "counts", "all-to-all", 8.0 * experts, 1, 0))
    if expert_tp > 1:
        found.append(Exchange("expert_tp", "counts", "all-gather", 8.0 * expert_tp * experts, 1, 0))
    over: tuple[tuple[Axis, int, int], ...] = (("ep", ep, rows), ("expert_tp", expert_tp, rows * expert_tp))
    for axis, size, sent in over:
        if size > 1:  # rows: there and back; over expert_tp copies of them, and parts of what they become
            found.append(Exchange(axis, "weights", "all-to-all", float(sent * wide), 1, 1))
            found.append(Exchange(axis, "rows", "all-to-all", float(sent * hidden * element), 2, 2, 1))
    if tp > 1 and not sequence_parallel:
        found.append(Exchange("tp", "tokens", "all-gather", float(tp * tokens * hidden * element), 1, 1))
    return found
