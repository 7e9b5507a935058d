"""What a cluster can give, read from Slurm's commands; what a job asks in vain, and that what is said would do."""

from __future__ import annotations

import pytest

from tests.slurm.test_script import TWO_NODES, recipe_of
from tplaunch.slurm.cluster import Cluster, Node, Partition, cluster_problems, parse_nodes, parse_partitions

# As Slurm 22.05 prints it, shortened.
PARTITIONS = """\
PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES DefaultTime=NONE MaxNodes=UNLIMITED \
MaxTime=UNLIMITED MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] State=UP TotalNodes=4 JobDefaults=(null)
PartitionName=gpu AllowGroups=ALL AllowAccounts=proj-1,proj-2 AllowQos=high Default=NO MaxNodes=2 \
MaxTime=1-12:00:00 MaxCPUsPerNode=64 Nodes=g[1-8] State=UP TotalNodes=8
"""
NODES = """\
main|8|4000|(null)
main|8|4000|gpu:4,nvme:1
gpu|128+|1000000+|gpu:h100:8(S:0-1)
gpu|128|1000000|gpu:a100:2(S:0),gpu:1g.10gb:7,craynetwork:4
"""


def test_partitions_are_read() -> None:
    assert parse_partitions(PARTITIONS) == [
        Partition("main", True, 4, None, None, None, None, None),
        Partition("gpu", False, 8, 36 * 3600, 2, 64, ["proj-1", "proj-2"], ["high"]),
    ]


def test_nodes_are_read() -> None:
    assert parse_nodes(NODES) == [
        Node("main", 8, 4000, {}),
        Node("main", 8, 4000, {"": 4}),
        Node("gpu", 128, 1000000, {"h100": 8}),
        Node("gpu", 128, 1000000, {"a100": 2, "1g.10gb": 7}),
    ]


SMALL = Partition("small", True, 3, 86400, None, None, None, None)
LARGE = Partition("large", False, 4, None, 2, 24, ["proj"], None)
CLUSTER = Cluster(
    [SMALL, LARGE, Partition("cloud", False, 64, None, None, None, None, None)],
    [
        *[Node("small", cpus, 4000, {"": 4}) for cpus in (16, 12, 8)],
        *[Node("large", 128, memory, {"h100": 8, "a100": 2}) for memory in (8000, 6000, 4000, 2000)],
    ],
)


@pytest.mark.parametrize(
    ("slurm", "fixes"),
    [
        ({}, {"launch.slurm.cpus_per_task": "12"}),  # 16 by default: two nodes have 12
        ({"cpus_per_task": 12}, {}),
        ({"cpus_per_task": 12, "mem": "5G"}, {"launch.slurm.mem": "4000M"}),
        ({"cpus_per_task": 13, "time": "1-1"}, {"launch.slurm.time": "1-00:00:00", "launch.slurm.cpus_per_task": "12"}),
        ({"gpus": False}, {}),
        ({"gpu_type": "h100"}, {"launch.slurm.gpu_type": "null", "launch.slurm.cpus_per_task": "12"}),
        ({"partition": "none"}, {"launch.slurm.partition": "one of small, large, cloud"}),
        ({"partition": "large", "account": "proj"}, {}),
        ({"partition": "large", "account": "x"}, {"launch.slurm.account": "one of proj"}),
        ({"partition": "large", "cpus_per_task": 32}, {"launch.slurm.cpus_per_task": "24"}),
        ({"partition": "large", "gpu_type": "a100"}, {"topology.gpus_per_node": "2"}),
        ({"partition": "large", "gpu_type": "b200"}, {"launch.slurm.gpu_type": "one of a100, h100"}),
        ({"partition": "large", "mem": "7G"}, {"launch.slurm.mem": "6000M"}),
        ({"partition": "small,large"}, {}),  # one of them does
        ({"partition": "cloud", "cpus_per_task": 512}, {}),  # Slurm does not show its nodes while they are off
        ({"time": "1-1", "cpus_per_task": 1, "qos": "long"}, {}),  # which may lift the limit
    ],
)
def test_what_cannot_be_given_is_told_with_what_can(slurm: dict, fixes: dict[str, str]) -> None:
    problems = cluster_problems(recipe_of(**slurm), TWO_NODES, CLUSTER)
    assert {problem.key: problem.fix.removeprefix(f"{problem.key}: ").split(";")[0] for problem in problems} == {
        key: fix.replace("null", "null: they have no types there") for key, fix in fixes.items()
    }


def test_too_many_nodes_are_told_once() -> None:
    big = TWO_NODES.__class__(tp=2, dp=8, pp=2, gpus_per_node=4)
    (problem,) = cluster_problems(recipe_of(cpus_per_task=8), big, CLUSTER)
    assert (problem.key, problem.fix) == ("topology.nodes", "topology.nodes: 3")


def test_gpus_in_too_few_nodes() -> None:
    mixed = Partition("mixed", True, 2, None, None, None, None, None)
    nodes = [Node("mixed", 32, 4000, {"": 4}), Node("mixed", 32, 4000, {})]
    (problem,) = cluster_problems(recipe_of(), TWO_NODES, Cluster([mixed], nodes))
    assert problem.what == "one node of partition mixed has 4 GPUs, 2 are asked for"
    assert problem.fix == "topology.nodes: 1"


def test_a_cluster_without_a_default_partition() -> None:
    cluster = Cluster([LARGE], [])
    (problem,) = cluster_problems(recipe_of(), TWO_NODES, cluster)
    assert problem.fix == "launch.slurm.partition: one of large"


def test_the_partition_of_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "large")
    assert cluster_problems(recipe_of(partition="none"), TWO_NODES, CLUSTER) == []
