"""Ranks, coordinates, groups, nodes and the split of layers, against brute force."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tplaunch.spec.schedules import SCHEDULES, stage_rank, stages_of
from tplaunch.spec.stages import LayerCosts, layer_ranges, split_layers
from tplaunch.spec.topology import AXES, EXPERT_AXES, Coordinates, ExpertCoordinates, Topology

sizes = st.integers(1, 6)
topologies = st.builds(Topology, tp=sizes, cp=sizes, dp=sizes, pp=sizes, gpus_per_node=st.integers(0, 9))


@given(topologies)
def test_ranks_and_coordinates_are_a_bijection(topology: Topology) -> None:
    coordinates = [topology.coordinates(rank) for rank in range(topology.world_size)]
    assert len(set(coordinates)) == topology.world_size == topology.tp * topology.cp * topology.dp * topology.pp
    for rank, place in enumerate(coordinates):
        assert topology.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank


@given(topologies)
def test_the_order_is_megatrons(topology: Topology) -> None:
    order = [
        Coordinates(tp, cp, dp, pp)
        for pp, dp, cp, tp in product(*(range(topology.size(axis)) for axis in ("pp", "dp", "cp", "tp")))
    ]
    assert [topology.coordinates(rank) for rank in range(topology.world_size)] == order


@given(topologies, st.sampled_from(AXES))
def test_groups_partition_the_world(topology: Topology, axis: str) -> None:
    groups = topology.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    assert {len(group) for group in groups} == {topology.size(axis)}
    for group in groups:
        for place, rank in enumerate(group):
            assert getattr(topology.coordinates(rank), axis) == place
            assert topology.group(axis, rank) == group


@given(topologies)
def test_two_ranks_share_a_group_exactly_when_they_differ_on_its_axis_only(topology: Topology) -> None:
    for one, other in combinations(range(min(topology.world_size, 24)), 2):
        here, there = topology.coordinates(one)._asdict(), topology.coordinates(other)._asdict()
        differing = [axis for axis in AXES if here[axis] != there[axis]]
        sharing = [axis for axis in AXES if other in topology.group(axis, one)]
        assert sharing == (differing if len(differing) == 1 else [])


@given(topologies)
def test_nodes_hold_consecutive_ranks(topology: Topology) -> None:
    nodes = [topology.node(rank) for rank in range(topology.world_size)]
    assert nodes == sorted(nodes)
    assert set(nodes) == set(range(topology.nodes))
    assert all(nodes.count(node) == topology.ranks_per_node for node in range(topology.nodes - 1))
    if topology.ranks_per_node % topology.tp == 0:
        assert all(topology.nodes_of_group("tp", rank) == 1 for rank in range(topology.world_size))


def test_a_pipeline_of_megatrons_paper() -> None:
    """Narayanan et al. 2021: tp 8 fills a node, dp 6 and then pp 64 go over the nodes."""
    topology = Topology(tp=8, dp=6, pp=64, gpus_per_node=8)
    assert (topology.world_size, topology.nodes) == (3072, 384)
    assert topology.group("tp", 9) == list(range(8, 16))
    assert topology.group("dp", 1) == [1, 9, 17, 25, 33, 41]
    assert topology.group("pp", 0)[:3] == [0, 48, 96]
    assert topology.describe(57) == "tp=1 dp=1 pp=1"
    assert topology.nodes_of_group("dp", 0) == 6


def test_a_world_without_cp_does_not_mention_it() -> None:
    without, shared = Topology(tp=2, dp=2, pp=2), Topology(tp=2, cp=2, dp=2)
    assert (without.sizes, without.describe(5)) == ("tp 2 x pp 2 x dp 2", "tp=1 dp=0 pp=1")
    assert (shared.sizes, shared.describe(6)) == ("tp 2 x cp 2 x pp 1 x dp 2", "tp=0 cp=1 dp=1 pp=0")
    assert without.place(5) == {"tp": 1, "dp": 0, "pp": 1}
    assert shared.place(6) == {"tp": 0, "cp": 1, "dp": 1, "pp": 0}


@st.composite
def folded(draw: st.DrawFn) -> Topology:
    """Worlds whose experts are spread."""
    expert_tp, ep, edp, pp = (draw(st.integers(1, 4)) for _ in range(4))
    stage = expert_tp * ep * edp
    tp = draw(st.sampled_from([d for d in range(1, stage + 1) if stage % d == 0]))
    cp = draw(st.sampled_from([d for d in range(1, stage // tp + 1) if stage // tp % d == 0]))
    return Topology(tp=tp, cp=cp, dp=stage // tp // cp, pp=pp, ep=ep, expert_tp=expert_tp)


@given(folded())
def test_experts_see_the_ranks_of_a_stage_in_their_order(topology: Topology) -> None:
    order = [
        ExpertCoordinates(expert_tp, ep, edp, pp)
        for pp, edp, ep, expert_tp in product(
            *(range(topology.size(axis)) for axis in ("pp", "edp", "ep", "expert_tp"))
        )
    ]
    assert [topology.expert_coordinates(rank) for rank in range(topology.world_size)] == order
    assert [topology.expert_rank(**place._asdict()) for place in order] == list(range(topology.world_size))
    assert [place.pp for place in order] == [topology.coordinates(rank).pp for rank in range(topology.world_size)]


@given(folded(), st.sampled_from(EXPERT_AXES))
def test_groups_of_experts_partition_the_world(topology: Topology, axis: str) -> None:
    groups = topology.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    assert {len(group) for group in groups} == {topology.size(axis)}
    for group in groups:
        for place, rank in enumerate(group):
            assert getattr(topology.expert_coordinates(rank), axis) == place
            assert topology.group(axis, rank) == group
            assert topology.coordinates(rank).pp == topology.coordinates(group[0]).pp or axis == "pp"


def test_the_fold_of_deepseek_v3() -> None:
    """arXiv 2412.19437, section 3.2: EP 64 over 8 nodes of 8, PP 16; so each expert is held twice by a stage's 128."""
    topology = Topology(dp=128, pp=16, gpus_per_node=8, ep=64)
    assert (topology.world_size, topology.stage_size, topology.edp) == (2048, 128, 2)
    assert topology.group("ep", 130) == list(range(128, 192))
    assert topology.group("edp", 130) == [130, 194]
    assert topology.nodes_of_group("ep", 130) == 8
    assert (topology.sizes, topology.expert_sizes) == ("tp 1 x pp 16 x dp 128", "ep 64 x edp 2")
    assert Topology(tp=2, dp=4, ep=2, expert_tp=2).expert_sizes == "expert_tp 2 x ep 2 x edp 2"


def test_a_world_without_spread_experts_does_not_mention_them() -> None:
    assert (Topology(tp=2, dp=4).expert_sizes, Topology(tp=2, dp=4).expert_axes) == ("", ())
    assert Topology(tp=2, dp=4).edp == 8


@pytest.mark.parametrize("rank", [-1, 8])
def test_no_such_rank(rank: int) -> None:
    with pytest.raises(IndexError, match=f"rank {rank} is outside a world of 8"):
        Topology(tp=2, dp=2, pp=2).coordinates(rank)


@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from(["1f1b", "interleaved1f1b", "zbvzerobubble", "dualpipev"]))
def test_stages_are_held_once(pp: int, virtual: int, schedule: str) -> None:
    if SCHEDULES[schedule].v_shaped:
        virtual = 2
    held = [stages_of(rank, pp, virtual, schedule) for rank in range(pp)]
    assert sorted(stage for stages in held for stage in stages) == list(range(pp * virtual))
    assert {len(stages) for stages in held} == {virtual}
    for rank, stages in enumerate(held):
        assert {stage_rank(stage, pp, schedule) for stage in stages} == {rank}


def test_v_schedules_come_back_to_the_first_rank() -> None:
    assert [stages_of(rank, 4, 2, "dualpipev") for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [stages_of(rank, 4, 2, "interleaved1f1b") for rank in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def costliest(counts: tuple[int, ...] | list[int], first: float, last: float) -> float:
    costs = [float(count) for count in counts]
    costs[0] += first
    costs[-1] += last
    return max(costs)


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Every way to write `total` as a sum of `parts` positive numbers, in order."""
    return [
        tuple(high - low for low, high in zip((0, *cuts), (*cuts, total), strict=True))
        for cuts in combinations(range(1, total), parts - 1)
    ]


costs = st.floats(0, 5, allow_nan=False)


@given(st.integers(1, 10), st.integers(1, 5), costs, costs)
def test_no_split_has_a_cheaper_costliest_stage(layers: int, stages: int, first: float, last: float) -> None:
    if layers < stages:
        with pytest.raises(ValueError, match="cannot fill"):
            split_layers(layers, stages, LayerCosts(first, last))
        return
    counts = split_layers(layers, stages, LayerCosts(first, last))
    assert sum(counts) == layers
    assert len(counts) == stages
    assert min(counts) >= 1
    best = min(costliest(split, first, last) for split in compositions(layers, stages))
    assert costliest(counts, first, last) <= best + 1e-9


@given(st.lists(st.floats(-0.9, 4), min_size=1, max_size=9), st.integers(1, 5), costs, costs)
def test_unequal_layers_are_split_as_well_as_can_be(more: list[float], stages: int, first: float, last: float) -> None:
    if len(more) < stages:
        return
    counts = split_layers(len(more), stages, LayerCosts(first, last, tuple(enumerate(more))))
    assert sum(counts) == len(more) and min(counts) >= 1

    def cost(split: tuple[int, ...] | list[int]) -> float:
        held = [sum(1 + more[layer] for layer in layers) for layers in layer_ranges(list(split))]
        held[0] += first
        held[-1] += last
        return max(held)

    assert cost(counts) <= min(map(cost, compositions(len(more), stages))) + 1e-6


@given(st.integers(1, 200), st.integers(1, 64))
def test_an_unweighed_split_is_even(layers: int, stages: int) -> None:
    if layers >= stages:
        counts = split_layers(layers, stages)
        assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(0, 9), min_size=1))
def test_layer_ranges_follow_one_another(counts: list[int]) -> None:
    ranges = layer_ranges(counts)
    assert [len(layers) for layers in ranges] == counts
    assert [layer for layers in ranges for layer in layers] == list(range(sum(counts)))
