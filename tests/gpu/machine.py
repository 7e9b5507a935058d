"""The machine that the tests of this folder run on: a GPU, or the CPU that stands in for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from tplaunch.machine import count_gpus

if TYPE_CHECKING:
    import torch

STAND_IN = "TPLAUNCH_GPU_STAND_IN"  # =1: the same on the CPU, small
T = TypeVar("T")


def on_cpu() -> bool:
    """Whether the CPU stands in."""
    return os.environ.get(STAND_IN) == "1"


def no_gpu() -> bool:
    """Whether there is neither a GPU nor the wish to do without."""
    return not on_cpu() and count_gpus() == 0


def choose(gpu: T, cpu: T) -> T:
    """A size: on a GPU, or on the CPU."""
    return cpu if on_cpu() else gpu


def take_device() -> torch.device:
    """The device of a process, or of each rank of a world: all share the first GPU."""
    import torch

    if on_cpu():
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device
