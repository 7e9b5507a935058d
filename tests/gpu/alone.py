"""A world of one rank in this process: NCCL on a GPU, gloo on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tests.gpu.machine import take_device
from tplaunch.parallel.mesh import init_process_group


@contextmanager
def alone() -> Iterator[None]:
    """Be the only rank, for the length of a `with` block."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    init_process_group(take_device(), timeout_s=120)
    try:
        yield
    finally:
        dist.destroy_process_group()
