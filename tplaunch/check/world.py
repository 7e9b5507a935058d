"""The size of the world: dp as a number, GPUs, nodes, and tensor-parallel groups that cross nodes."""

from __future__ import annotations

from collections.abc import Iterator

from tplaunch.check.choices import choices, divisors
from tplaunch.check.rules import replicas
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.topology import Topology


def data_parallel(recipe: Recipe, gpus: int | None) -> tuple[int | None, list[Problem]]:
    """dp as a number (None where it cannot be told), and what is wrong with the size of the world."""
    parallelism = recipe.topology
    nodes, per_node = parallelism.nodes, parallelism.gpus_per_node
    replica = parallelism.tp * parallelism.cp * parallelism.pp
    shown = [axis for axis in ("tp", "cp", "pp") if axis != "cp" or parallelism.cp > 1]
    product, axes = " x ".join(shown), " x ".join(f"{axis} {getattr(parallelism, axis)}" for axis in shown)
    problems: list[Problem] = []
    stated = nodes * per_node if per_node else None
    fill = stated or gpus or replica
    if parallelism.dp != "auto":
        dp = parallelism.dp
    elif fill % replica == 0:
        dp = fill // replica
    else:
        sizes = choices(divisors(fill), replica)
        if fill < replica:
            what, key = f"one replica needs {replica} GPUs ({axes}), there are {fill}", "topology.tp"
            return None, [Problem(what, fix=f"make {product} {sizes}", key=key)]
        what, key = f"auto cannot fill {fill} GPUs with replicas of {replica} ({axes})", "topology.dp"
        return None, [Problem(what, fix=f"make {product} {sizes}, or state dp: {fill // replica}", key=key)]
    world = replica * dp
    equation = f"{world} ranks ({axes} x dp {dp})"
    if gpus is not None and world > gpus:
        fewer = f"dp: {gpus // replica}" if gpus >= replica else f"make {product} {choices(divisors(gpus), replica)}"
        problems.append(Problem(f"{equation}, but there are {gpus} GPUs", fix=fewer, key="topology.dp"))
    if stated is not None and world != stated:
        fits = stated % replica == 0
        problems.append(
            Problem(
                f"{equation}, but nodes {nodes} x gpus_per_node {per_node} = {stated}",
                fix=f"dp: {stated // replica}, or dp: auto" if fits else f"make nodes x gpus_per_node {world}",
                key="topology.gpus_per_node",
            )
        )
    elif world % nodes:
        problems.append(
            Problem(
                f"{equation} cannot be spread evenly over {nodes} nodes",
                fix=f"nodes: {choices(divisors(world), nodes)}",
                key="topology.nodes",
            )
        )
    problems += replicas(recipe, dp)
    return dp, problems


def placement_warnings(topology: Topology, async_tp: bool) -> Iterator[Problem]:
    if topology.nodes == 1:
        return
    if topology.gpus_per_node % topology.tp:
        if async_tp:
            yield Problem("is off: tp groups cross nodes, where memory is not shared", key="topology.async_tp")
        yield _crossing(topology, "tp", "every layer waits for its tp group")
    if topology.gpus_per_node % topology.expert_tp:
        yield _crossing(topology, "expert_tp", "every layer of experts waits for its expert_tp group")


def _crossing(topology: Topology, axis: str, waits: str) -> Problem:
    return Problem(
        f"{axis} groups of {topology.size(axis)} cross nodes of {topology.gpus_per_node} GPUs",
        why=f"{waits}, and the network is far slower than the links inside a node",
        fix=f"{axis}: {choices(divisors(topology.gpus_per_node), topology.size(axis))}",
        key=f"topology.{axis}",
    )
