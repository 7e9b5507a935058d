"""What every peer's driver shares: its arguments, random tokens, the clock, and the result."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.llama import Shape
from benchmarks.peers.work import LEARNING_RATE, PEERS, SHAPES, WEIGHT_DECAY, Grid

WARM_UP = 3  # as many as `tplaunch bench` has
Microbatches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """One rank's part of a measurement.

    Args:
        output: the file for the result, which rank 0 writes.
    """

    shape: Shape
    grid: Grid
    steps: int
    output: Path

    @property
    def microbatches(self) -> int:
        """Of one step on this rank."""
        return self.shape.microbatches(self.grid.dp)


def start() -> Job:
    """Read the command line and join the world, which is one of gloo even where it has one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--grid", type=Grid.parse, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == given.grid.ranks
    torch.manual_seed(0)
    return Job(SHAPES[given.shape], given.grid, given.steps, given.output)


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every trainer."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def measure(job: Job, trainer: str, train: Callable[[Microbatches], float | None]) -> None:
    """Time the steps, leave the result, and leave the world.

    Args:
        trainer: its name in `PEERS`.
        train: one optimizer step on this rank's microbatches of (tokens, targets), each [micro, seq]; returns the mean
            loss over all, or None on a rank that does not hold it.
    """
    shape = job.shape
    drawn = torch.randint(shape.vocab, (job.microbatches, shape.micro, shape.seq + 1))
    data = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in drawn]
    seconds, losses, first_step = [], [], 0.0
    for _ in range(WARM_UP + job.steps):
        dist.barrier()
        began = time.perf_counter()
        loss = train(data)
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
        first_step = first_step or time.time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = (seconds[WARM_UP:], peak, losses, first_step)
    ranks = [mine] * job.grid.ranks
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        times, peaks, all_losses, first_steps = zip(*ranks, strict=True)
        held = next(found for found in all_losses if found[0] is not None)
        result = {
            "seconds": [max(step) for step in zip(*times, strict=True)],
            "peak_memory": max(peaks),
            "first_step": max(first_steps),  # when it ended, seconds since the epoch
            "loss": [held[0], held[-1]],
            "versions": {package: version(package) for package in PEERS[trainer]},
        }
        job.output.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
