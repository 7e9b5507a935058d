"""The nodes of a job: their order, and what becomes of the job where some are not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tplaunch.errors import Exit
from tplaunch.launch.supervise import give_up
from tplaunch.run.directory import RunDir
from tplaunch.run.events import BadNodes
from tplaunch.slurm import client
from tplaunch.slurm.own_job import GIVE_UP, may_requeue, own_job_id, requeue, say


def check_nodes(run_dir: RunDir, lines: Sequence[str]) -> Exit:
    """Read what the nodes say of themselves and print their order, one a line; or send the job away from bad ones.

    Args:
        lines: from `tplaunch.slurm.node_check`, among others. A node that says nothing is taken as it is.
    """
    job_id = own_job_id()
    names = client.node_names(os.environ["SLURM_JOB_NODELIST"])
    reports = list(node_reports(lines))
    bad = {report["node"]: report["problems"] for report in reports if report["problems"]}
    for node, problems in bad.items():
        say(f"node {node} is not fit: {'; '.join(problems)}")
    if not bad:
        addresses = {report["node"]: report["address"] for report in reports}
        print("\n".join(order_nodes(names, addresses) if set(names) <= set(addresses) else names))
        return Exit.DONE
    run_dir.append(BadNodes(sorted(bad), job_id, bad))
    if len(names) > 1 and len(bad) == len(names):
        say("every node says so: the cause is not a node; giving up")
        return Exit.FAILED
    history = run_dir.history()
    if history.failures_since_progress >= GIVE_UP:
        say(give_up(GIVE_UP))
        return Exit.FAILED
    if may_requeue(run_dir):
        return Exit.STOPPED if requeue(job_id, exclude=sorted(bad)) else Exit.FAILED
    for later in history.jobs_after(job_id):
        client.exclude_nodes(later, sorted(bad))
    say("launch.slurm.requeue is off: a later job of the chain, or a new one with launch.slurm.exclude, can go on")
    return Exit.FAILED


def node_reports(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The nodes' reports; a line that a node has garbled is no report."""
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and report.keys() >= {"node", "address", "problems"}:
            yield report


def order_nodes(nodes: Sequence[str], addresses: Mapping[str, str]) -> list[str]:
    """The nodes with those on one switch side by side, else in the order that Slurm gives them.

    Args:
        addresses: of each node, its switches and itself, outermost first: "s0.s2.n3" (SLURM_TOPOLOGY_ADDR).
    """
    seen: dict[str, int] = {}
    keys = {}
    for node in nodes:
        switches = addresses[node].split(".")[:-1]
        paths = [".".join(switches[: depth + 1]) for depth in range(len(switches))]
        keys[node] = [seen.setdefault(path, len(seen)) for path in paths]
    return sorted(nodes, key=keys.__getitem__)
