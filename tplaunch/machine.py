"""What this machine has, asked without torch."""

from __future__ import annotations

import os
from itertools import takewhile
from pathlib import Path

SHARE_GPUS = "TPLAUNCH_SHARE_GPUS"  # =1: ranks may share GPUs, over gloo, to try things out


def shares_gpus() -> bool:
    """Whether the user lets ranks share GPUs."""
    return os.environ.get(SHARE_GPUS) == "1"


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def count_gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started here would see; CUDA_VISIBLE_DEVICES counts, as it does for CUDA."""
    present = sum(node.name.removeprefix("nvidia").isdecimal() for node in devices.glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    # CUDA reads the list up to the first entry that names no device: "0,-1,1" shows one GPU, "" none.
    names = (name.strip() for name in visible.split(","))
    return len(list(takewhile(lambda name: name not in ("", "-1"), names)))
