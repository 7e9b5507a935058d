"""What a run's dashboards say beside its recipe: where it runs, on what, and by which versions."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import tplaunch

_SLURM = {
    "job_id": "SLURM_JOB_ID",
    "job_name": "SLURM_JOB_NAME",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
    "cluster": "SLURM_CLUSTER_NAME",
    "restarts": "SLURM_RESTART_COUNT",
}


def slurm_job(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Slurm says of the job; {} outside of one."""
    if "SLURM_JOB_ID" not in environ:
        return {}
    return {key: environ[name] for key, name in _SLURM.items() if name in environ}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"tplaunch": tplaunch.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["hip"] = torch.version.hip
    return found


def machines(hosts: Sequence[str], devices: Sequence[str]) -> dict[str, Any]:
    """Where the ranks run.

    Args:
        hosts, devices: names, by rank.
    """
    return {"hosts": [*dict.fromkeys(hosts)], "devices": dict(Counter(devices))}
