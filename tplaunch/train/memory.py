"""What a process has held at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device) -> float:
    """Bytes: torch's peak on a GPU, the process's largest resident size on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    kib = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib)
