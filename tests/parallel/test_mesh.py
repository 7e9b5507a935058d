"""Which device a rank takes, and which ranks belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tests.recipes import case, ranks, resolved
from tplaunch.machine import SHARE_GPUS
from tplaunch.parallel import mesh
from tplaunch.torch_private import FakeStore


def test_ranks_share_gpus_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh.local_device(3) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(RuntimeError, match="8 ranks of this node would share 4 GPUs") as caught:
        mesh.local_device(5)
    assert "ask for 8 GPUs a node" in str(caught.value)
    monkeypatch.setenv(SHARE_GPUS, "1")
    assert mesh.local_device(5) == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 3), torch.device("cuda", 1)]


def groups_of(raw: dict[str, Any], rank: int) -> dict[str, list[int]]:
    """The ranks that a rank shares weights with, by axis, and those it shares sequences with."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks(raw))
    try:
        made = mesh.Mesh.of(resolved(raw), torch.device("cpu"))

        def members(of: DeviceMesh) -> list[int]:
            return dist.get_process_group_ranks(of.get_group())

        found = {axis: members(made.world[axis]) for axis in ("tp", "dp_replicate", "dp_shard", "pp")}
        return {**found, **({} if made.cp is None else {"cp": members(made.cp.mesh)})}
    finally:
        dist.destroy_process_group()


def test_ranks_that_share_sequences_share_weights_too() -> None:
    # Rank 9 of tp 2, cp 2, dp 4, pp 2 is the second of tp, the first of cp, the third of dp, the first of pp.
    layout: dict[str, Any] = {"tp": 2, "pp": 2, "dp": 4, "cp": 2, "training": {"micro_batch_size": 1}}
    same = {"tp": [8, 9], "cp": [9, 11], "pp": [9, 25]}
    assert groups_of(case(**layout, zero=1), 9) == {
        **same,
        "dp_replicate": [9],
        "dp_shard": [1, 3, 5, 7, 9, 11, 13, 15],
    }
    assert groups_of(case(**layout, zero=0), 9) == {
        **same,
        "dp_shard": [9],
        "dp_replicate": [1, 3, 5, 7, 9, 11, 13, 15],
    }
    hybrid = groups_of(case(**layout, zero=3, dp_replicate=2), 9)
    assert hybrid == {**same, "dp_shard": [9, 11, 13, 15], "dp_replicate": [1, 9]}
    assert groups_of(case(2, 1, 2, cp=2, dp_replicate=2, zero=1), 0)["dp_shard"] == [0, 2]
    assert "cp" not in groups_of(case(2, 1, 2), 0)


@pytest.mark.parametrize(("kind", "held"), [("allgather", [2, 3, 4, 5]), ("ulysses", [4, 5, 6, 7])])
def test_a_rank_cuts_its_pieces(kind: str, held: list[int]) -> None:
    raw = case(cp=2, cp_kind=kind, training={"seq_len": 8})
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        cp = mesh.Mesh.of(resolved(raw), torch.device("cpu")).cp
        assert cp is not None
        assert cp.cut(torch.arange(8).repeat(3, 1)).tolist() == [held] * 3
        assert cp.cut(torch.empty(3, 0)).shape == (3, 0)
    finally:
        dist.destroy_process_group()


MOE = {"moe": {"experts": 8, "top_k": 2, "ffn_hidden_size": 32}}


def expert_groups(raw: dict[str, Any], rank: int) -> dict[str, list[int]]:
    """The ranks along each axis that experts lie on."""
    raw = {**raw, "model": {**raw["model"], **MOE}}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks(raw))
    try:
        experts = mesh.Mesh.of(resolved(raw), torch.device("cpu")).experts
        assert experts is not None
        groups = {axis: experts.world.get_group(axis) for axis in ("expert_tp", "ep", "edp_replicate", "edp_shard")}
        assert groups["ep"] == experts.ep.group and groups["expert_tp"] == experts.tp.group
        assert experts.data.size() == len(dist.get_process_group_ranks(groups["edp_shard"])) * experts.ranks.copies
        return {name: dist.get_process_group_ranks(group) for name, group in {**groups, "stage": experts.stage}.items()}
    finally:
        dist.destroy_process_group()


def test_experts_fold_into_the_ranks_of_a_stage() -> None:
    """expert_tp fastest, then ep, then edp: whatever tp, cp and dp are."""
    layout: dict[str, Any] = {"tp": 2, "pp": 2, "dp": 4, "cp": 2, "training": {"micro_batch_size": 1}}
    folded = expert_groups(case(**layout, zero=1, ep=4, expert_tp=2), 21)
    assert folded == {
        "expert_tp": [20, 21],
        "ep": [17, 19, 21, 23],
        "edp_replicate": [21],
        "edp_shard": [21, 29],
        "stage": list(range(16, 32)),
    }
    without = expert_groups(case(**layout, zero=0, ep=4, expert_tp=2), 21)
    assert without == {**folded, "edp_replicate": [21, 29], "edp_shard": [21]}
    hybrid = expert_groups(case(**layout, zero=3, dp_replicate=2, ep=2), 0)
    assert hybrid["ep"] == [0, 1] and hybrid["edp_shard"] == [0, 2, 4, 6] and hybrid["edp_replicate"] == [0, 8]
    assert expert_groups(case(**layout), 5)["edp_shard"] == list(range(16))


def test_a_world_without_experts_makes_no_groups_for_them() -> None:
    raw = case(2, 1, 2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        assert mesh.Mesh.of(resolved(raw), torch.device("cpu")).experts is None
    finally:
        dist.destroy_process_group()
