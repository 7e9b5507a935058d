"""Verifies at start-up that each rank runs on the node and GPU that the topology expects."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tplaunch.errors import Problem
from tplaunch.spec.topology import Topology

NODES_DRAWN = 8  # a picture of a thousand nodes helps nobody


@dataclass(frozen=True)
class View:
    """What a rank sees of its own place.

    Args:
        rank: its number in the world.
        local_rank: its number on its node, and that of its GPU.
        node: the node's name.
        node_rank: the number of its torchrun, in node order.
    """

    rank: int
    local_rank: int
    node: str
    node_rank: int


def own_view(environ: Mapping[str, str] = os.environ) -> View:
    """The view of this process, from the environment that torchrun and Slurm give it."""
    return View(
        rank=int(environ["RANK"]),
        local_rank=int(environ["LOCAL_RANK"]),
        node=host_name(environ),
        node_rank=int(environ.get("GROUP_RANK", "0")),
    )


def host_name(environ: Mapping[str, str] = os.environ) -> str:
    """This node's name. Slurm's first: nodes of a simulated cluster share one hostname."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_placement(topology: Topology, views: Sequence[View]) -> list[Problem]:
    """Compare every rank's view with the plan: rank r is local rank r % n of node r // n, n ranks a node.

    Args:
        topology: the plan.
        views: one for each rank, in any order.

    Returns:
        Nothing where all is well; else one problem with a picture of the nodes concerned.
    """
    ranks = sorted(view.rank for view in views)
    if ranks != list(range(topology.world_size)):
        missing = sorted(set(range(topology.world_size)) - set(ranks))
        what = f"the plan has {topology.world_size} ranks, but {len(ranks)} came"
        return [Problem(what, why=f"missing: {missing[:16]}" if missing else "some came twice or are too many")]
    per_node = topology.ranks_per_node
    # The name of each planned node is the one that its first rank sees.
    name_of = {view.rank // per_node: view.node for view in views if view.rank % per_node == 0}
    owner: dict[str, int] = {}
    for planned, name in sorted(name_of.items()):
        owner.setdefault(name, planned)
    wrong = {
        view.rank
        for view in views
        if view.local_rank != view.rank % per_node
        or view.node_rank != view.rank // per_node
        or owner.get(view.node) != view.rank // per_node
    }
    if not wrong:
        return []
    node_of = {view.rank: view.node for view in views}
    torn = [
        f"tensor-parallel ranks {', '.join(map(str, group))} are on several nodes"
        for group in topology.groups("tp")
        if len({node_of[rank] for rank in group}) > topology.nodes_of_group("tp", group[0])
    ]
    return [
        Problem(
            f"{len(wrong)} of {len(views)} ranks are not where the plan has them",
            why="\n".join([*torn[:1], picture(topology, views, wrong)]),
            fix=f"start one torchrun a node with --nproc-per-node={per_node}, --node-rank in node order, "
            "as `tplaunch submit` does",
        )
    ]


def picture(topology: Topology, views: Sequence[View], wrong: set[int]) -> str:
    """The nodes that hold misplaced ranks, a rank a line, each wrong one with the place it should have."""
    nodes: dict[str, list[View]] = {}
    for view in sorted(views, key=lambda v: v.rank):
        nodes.setdefault(view.node, []).append(view)
    bad = {name: held for name, held in nodes.items() if any(view.rank in wrong for view in held)}
    lines = []
    for name, held in list(bad.items())[:NODES_DRAWN]:
        lines.append(f"  node {name}")
        for view in held:
            line = f"    GPU {view.local_rank}: rank {view.rank} ({topology.describe(view.rank)})"
            if view.rank in wrong:
                node, gpu = divmod(view.rank, topology.ranks_per_node)
                line += f"  <- belongs on node {node}, GPU {gpu}"
            lines.append(line)
    if len(bad) > NODES_DRAWN:
        lines.append(f"  ... and {len(bad) - NODES_DRAWN} nodes more")
    return "\n".join(lines)
