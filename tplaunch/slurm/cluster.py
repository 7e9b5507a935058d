"""What a cluster can give, by `scontrol` and `sinfo`, and what a job asks of it in vain."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.slurm import client
from tplaunch.slurm.options import cpus_per_node
from tplaunch.spec.topology import Topology
from tplaunch.units import MiB, format_slurm_memory, format_slurm_time, parse_slurm_time


@dataclass(frozen=True)
class Partition:
    """A part of the cluster, with its rules; None: no limit.

    Args:
        default: jobs that name no partition go there.
        nodes: how many it has, also those that Slurm does not show while they are off.
        max_time: seconds.
        max_nodes, max_cpus: of a job, and of a job on each node.
        accounts, qos: that alone may use it.
    """

    name: str
    default: bool
    nodes: int
    max_time: int | None
    max_nodes: int | None
    max_cpus: int | None
    accounts: list[str] | None
    qos: list[str] | None


@dataclass(frozen=True)
class Node:
    """A node of a partition.

    Args:
        memory: MiB.
        gpus: how many of each type; "" is the type of those that have none.
    """

    partition: str
    cpus: int
    memory: int
    gpus: Mapping[str, int]

    def gpus_of(self, kind: str | None) -> int:
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


@dataclass(frozen=True)
class Cluster:
    partitions: Sequence[Partition]
    nodes: Sequence[Node]


def read_cluster() -> Cluster:
    """Ask Slurm for its partitions and nodes.

    Raises:
        TplaunchError: see `tplaunch.slurm.client.call`.
    """
    partitions = parse_partitions(client.call("scontrol", "--all", "--oneliner", "show", "partition"))
    return Cluster(
        partitions, parse_nodes(client.call("sinfo", "--all", "--noheader", "--Node", "--format=%R|%c|%m|%G"))
    )


def parse_partitions(text: str) -> list[Partition]:
    """The partitions in the output of `scontrol --oneliner show partition`."""
    found = []
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        known = {
            key: value for key, value in fields.items() if value not in ("ALL", "UNLIMITED", "NONE", "(null)", "N/A")
        }
        if "PartitionName" not in fields:
            continue
        numbers = {key: int(value) for key, value in known.items() if value.isdecimal()}
        accounts, qos = known.get("AllowAccounts"), known.get("AllowQos")
        found.append(
            Partition(
                fields["PartitionName"],
                default=known.get("Default") == "YES",
                nodes=numbers.get("TotalNodes", 0),
                max_time=parse_slurm_time(known["MaxTime"]) if "MaxTime" in known else None,
                max_nodes=numbers.get("MaxNodes"),
                max_cpus=numbers.get("MaxCPUsPerNode"),
                accounts=accounts.split(",") if accounts else None,
                qos=qos.split(",") if qos else None,
            )
        )
    return found


def parse_nodes(text: str) -> list[Node]:
    """The nodes, once for each of their partitions, in the output of `sinfo --Node --format='%R|%c|%m|%G'`."""
    found = []
    for line in text.splitlines():
        partition, cpus, memory, gres = line.split("|", 3)
        gpus: dict[str, int] = {}
        # Such as gpu:h100:8(S:0-1),gpu:2,nvme:1; MIG's types have dots.
        for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]*[^\d:,()][^:,()]*))?:(\d+)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(count)
        found.append(Node(partition, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus))
    return found


def cluster_problems(recipe: Recipe, topology: Topology, cluster: Cluster) -> list[Problem]:
    """What the cluster can never give, each with the key and a value that would do.

    Of several partitions that the recipe names one must do. Nodes that are down or busy count: the job may wait.
    """
    asked = recipe.launch.slurm.partition
    # As to sbatch, the environment goes before the script.
    named = [name for name in (os.environ.get("SBATCH_PARTITION") or asked or "").split(",") if name]
    known = {partition.name: partition for partition in cluster.partitions}
    if not known:
        return []
    key, names = "launch.slurm.partition", ", ".join(known)
    unknown = [name for name in named if name not in known]
    if unknown:
        return [Problem(f"the cluster has no partition {unknown[0]}", fix=f"{key}: one of {names}", key=key)]
    chosen = [known[name] for name in named] or [part for part in cluster.partitions if part.default]
    if not chosen:
        return [Problem("the cluster has no default partition", fix=f"{key}: one of {names}", key=key)]
    found = []
    for partition in chosen:
        nodes = [node for node in cluster.nodes if node.partition == partition.name]
        found.append(
            [*_rule_problems(recipe, topology, partition), *_node_problems(recipe, topology, partition, nodes)]
        )
    return min(found, key=len)


def _rule_problems(recipe: Recipe, topology: Topology, partition: Partition) -> Iterator[Problem]:
    slurm, where = recipe.launch.slurm, f"partition {partition.name}"
    for field, allowed in (("account", partition.accounts), ("qos", partition.qos)):
        value, key = getattr(slurm, field), f"launch.slurm.{field}"
        if allowed is not None and value is not None and value not in allowed:
            yield Problem(f"{where} does not take {value}", fix=f"{key}: one of {', '.join(allowed)}", key=key)
    if slurm.qos is not None:  # may lift the partition's limits
        return
    if slurm.time is not None and partition.max_time is not None and slurm.time > partition.max_time:
        most, key = format_slurm_time(partition.max_time), "launch.slurm.time"
        what = f"{format_slurm_time(slurm.time)} is longer than {where} allows"
        yield Problem(what, fix=f"{key}: {most}; what is left goes on in the next attempt", key=key)
    most_nodes = min(partition.nodes or topology.nodes, partition.max_nodes or topology.nodes)
    if topology.nodes > most_nodes:
        what = f"{where} gives a job at most {most_nodes} nodes, not {topology.nodes}"
        yield Problem(what, fix=f"topology.nodes: {most_nodes}", key="topology.nodes")


def _node_problems(recipe: Recipe, topology: Topology, partition: Partition, nodes: list[Node]) -> Iterator[Problem]:
    """What too few nodes have; each later question is asked of nodes that pass the earlier ones, or come nearest."""
    slurm, count = recipe.launch.slurm, topology.nodes
    # Nodes in a cloud that are off are not shown; too many nodes are told of already.
    if len(nodes) < max(partition.nodes, count):
        return
    if slurm.gpus:
        ranks, kind = topology.ranks_per_node, slurm.gpu_type
        fit = [node for node in nodes if node.gpus_of(kind) >= ranks]
        if len(fit) < count:
            types = sorted({name for node in nodes for name in node.gpus})
            most = _best(nodes, count, lambda node: node.gpus_of(kind))
            what = _few(fit, count, partition, f"{ranks} GPUs" + (f" of type {kind}" if kind else ""))
            if not types:
                yield Problem(what, fix="launch.slurm.gpus: false, or another partition", key="launch.slurm.gpus")
            elif kind is not None and not any(node.gpus_of(kind) for node in nodes):
                text = f"one of {', '.join(filter(None, types))}" if any(types) else "null: they have no types there"
                yield Problem(what, fix=f"launch.slurm.gpu_type: {text}", key="launch.slurm.gpu_type")
            elif most:
                yield Problem(what, fix=f"topology.gpus_per_node: {most}", key="topology.gpus_per_node")
            else:
                some = sum(node.gpus_of(kind) > 0 for node in nodes)
                yield Problem(what, fix=f"topology.nodes: {some}", key="topology.nodes")
            fit = sorted(nodes, key=lambda node: -node.gpus_of(kind))[:count]
        nodes = fit
    cpus = cpus_per_node(recipe, topology)

    def usable(node: Node) -> int:
        return min(node.cpus, partition.max_cpus or node.cpus)

    fit = [node for node in nodes if usable(node) >= cpus]
    if len(fit) < count:
        key, why = "launch.slurm.cpus_per_task", ""
        if slurm.cpus_per_task is None:
            why = f"the default is {cpus // topology.ranks_per_node} for each of {topology.ranks_per_node} ranks"
        what = _few(fit, count, partition, f"{cpus} CPUs")
        yield Problem(what, why=why, fix=f"{key}: {_best(nodes, count, usable)}", key=key)
        fit = sorted(nodes, key=lambda node: -usable(node))[:count]
    nodes = fit
    fit = [node for node in nodes if node.memory * MiB >= (slurm.mem or 0)]
    if slurm.mem is not None and len(fit) < count:
        key, size = "launch.slurm.mem", format_slurm_memory(_best(nodes, count, lambda node: node.memory) * MiB)
        what = _few(fit, count, partition, f"{format_slurm_memory(slurm.mem)} of memory")
        yield Problem(what, fix=f"{key}: {size}", key=key)


def _best(nodes: Sequence[Node], count: int, amount: Callable[[Node], int]) -> int:
    """The most that so many of the nodes have."""
    return sorted(map(amount, nodes), reverse=True)[count - 1]


def _few(fit: Sequence[Node], count: int, partition: Partition, amount: str) -> str:
    """Too few nodes have something, as a sentence."""
    number = {0: "no node", 1: "one node"}.get(len(fit), f"{len(fit)} nodes")
    asked = f", {count} are asked for" if fit else ""
    return f"{number} of partition {partition.name} {'have' if len(fit) > 1 else 'has'} {amount}{asked}"
