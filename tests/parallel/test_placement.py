"""The rank map, against brute force at 1,024 nodes, and the check of it from every rank's view."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tplaunch.parallel.placement import View, check_placement, own_view
from tplaunch.spec.topology import Topology


def views_of(topology: Topology) -> list[View]:
    """What torchrun gives: on node n, local rank l has rank n * ranks_per_node + l."""
    return [
        View(rank=node * topology.ranks_per_node + local, local_rank=local, node=f"n{node}", node_rank=node)
        for node in range(topology.nodes)
        for local in range(topology.ranks_per_node)
    ]


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (2, 1, 2, 2, 2), (2, 2, 2, 2, 4), (8, 1, 16, 4, 8), (8, 2, 64, 16, 8)]
)
def test_ranks_in_node_order_are_well_placed(sizes: tuple[int, int, int, int, int]) -> None:
    topology = Topology(*sizes)
    assert check_placement(topology, views_of(topology)) == []
    assert check_placement(topology, views_of(topology)[::-1]) == []


def test_two_swapped_nodes_are_refused_with_a_picture() -> None:
    topology = Topology(tp=2, dp=1, pp=2, gpus_per_node=2)
    swapped = [replace(v, node_rank=1 - v.node_rank, node={"n0": "n1", "n1": "n0"}[v.node]) for v in views_of(topology)]
    (problem,) = check_placement(topology, swapped)
    assert "4 of 4 ranks" in problem.what
    assert "GPU 1: rank 3 (tp=1 dp=0 pp=1)  <- belongs on node 1, GPU 1" in problem.why


def test_a_torn_tp_group_is_named() -> None:
    topology = Topology(tp=2, dp=2, gpus_per_node=2)
    views = views_of(topology)
    torn = [views[0], replace(views[1], node="n1"), replace(views[2], node="n0"), views[3]]
    (problem,) = check_placement(topology, torn)
    assert "ranks 0, 1 are on several nodes" in problem.why


def test_two_torchruns_on_one_node_are_refused() -> None:
    """As when Slurm packs two tasks on a node: two planned nodes, one name."""
    topology = Topology(tp=2, dp=2, gpus_per_node=2)
    (problem,) = check_placement(topology, [replace(v, node="n0") for v in views_of(topology)])
    assert "rank 2 (tp=0 dp=1 pp=0)  <- belongs on node 1, GPU 0" in problem.why


def test_swapped_local_ranks_are_refused() -> None:
    topology = Topology(tp=2, gpus_per_node=2)
    assert check_placement(topology, [replace(v, local_rank=1 - v.local_rank) for v in views_of(topology)])


@pytest.mark.parametrize("spoil", [lambda v: v[:-1], lambda v: v + [v[0]], lambda v: v[:-1] + [v[0]]])
def test_missing_and_double_ranks_are_refused(spoil) -> None:
    topology = Topology(dp=4, gpus_per_node=2)
    (problem,) = check_placement(topology, spoil(views_of(topology)))
    assert "the plan has 4 ranks" in problem.what


def test_any_swap_of_two_ranks_is_found() -> None:
    topology = Topology(tp=2, dp=2, pp=2, gpus_per_node=4)
    views = views_of(topology)
    for a in range(8):
        for b in range(a):
            swapped = list(views)
            swapped[a], swapped[b] = replace(views[a], rank=b), replace(views[b], rank=a)
            assert check_placement(topology, swapped)


def test_a_picture_of_a_thousand_wrong_nodes_stays_short() -> None:
    topology = Topology(tp=8, dp=1024, gpus_per_node=8)
    shifted = [replace(v, node_rank=(v.node_rank + 1) % 1024) for v in views_of(topology)]
    (problem,) = check_placement(topology, shifted)
    assert "1016 nodes more" in problem.why
    assert len(problem.why.splitlines()) < 100


def test_own_view_prefers_slurms_node_name() -> None:
    environ = {"RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "2", "SLURMD_NODENAME": "n3"}
    assert own_view(environ) == View(rank=5, local_rank=1, node="n3", node_rank=2)


def test_the_map_of_1024_nodes_equals_brute_force() -> None:
    """8,192 ranks as TP8 x PP16 x DP64 on 8 GPUs a node: coordinates, node and group members by three loops."""
    tp, pp, dp, per_node = 8, 16, 64, 8
    topology = Topology(tp=tp, pp=pp, dp=dp, gpus_per_node=per_node)
    assert topology.nodes == 1024
    at, rank = {}, 0
    for p in range(pp):
        for d in range(dp):
            for t in range(tp):
                at[t, d, p] = rank
                place = topology.coordinates(rank)
                assert (place.tp, place.dp, place.pp) == (t, d, p)
                assert topology.node(rank) == rank // per_node
                rank += 1
    for (t, d, p), rank in at.items():
        assert topology.group("tp", rank) == [at[i, d, p] for i in range(tp)]
        assert topology.group("dp", rank) == [at[t, i, p] for i in range(dp)]
        assert topology.group("pp", rank) == [at[t, d, i] for i in range(pp)]
        assert topology.nodes_of_group("tp", rank) == 1
        # Pipeline neighbours are dp x tp ranks apart: as near as tp inside the node allows.
        if p + 1 < pp:
            assert topology.node(at[t, d, p + 1]) - topology.node(rank) == dp
