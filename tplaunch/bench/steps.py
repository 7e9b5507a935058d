"""What the steps of the real trainer take on one rank of a world, and where their time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.train.batch import Batch, random_batch
from tplaunch.train.memory import peak_memory
from tplaunch.train.step import TrainStep

WARM_UP = 3


@dataclass(frozen=True)
class Steps:
    """Measured steps; figures of parts are means over the ranks.

    Args:
        seconds: of each step, by the slowest rank.
        parts: seconds of a step by what the rank was in ("forward and backward", "gradients", "update").
        kernels: seconds of a step in kernels, by kind, on each rank's device. What is left of the step is
            communication that no kernel shows, waiting, and Python.
        peak_memory: bytes of the fullest rank: torch's peak on a GPU, the process's resident size on the CPU.
    """

    seconds: list[float]
    parts: dict[str, float]
    kernels: dict[str, float]
    peak_memory: float


class _Clock:
    """Sums up the seconds between the marks of a step, by what the rank was in."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: defaultdict[str, float] = defaultdict(float)
        self._part, self._since = "", 0.0

    def mark(self, step: int, part: str) -> None:
        """A part of a step begins (`TrainStep.mark`)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._part:
            self.parts[self._part] += now - self._since
        self._part, self._since = part, now


def measure_steps(recipe: Recipe, mesh: Mesh, count: int) -> Steps:
    """Train on random tokens: a few steps to warm up, `count` that are timed, as many whose parts are, and one that is
    profiled.

    The parts have steps of their own: on a GPU their clock waits for the device, which hides no launch behind work as
    training does. Every rank of the world must call it; all get the same answer.
    """
    device = mesh.device
    step = TrainStep(recipe, mesh)
    batch = random_batch(recipe, mesh.topology.dp, step.pipeline.reads_data).pinned_for(device)
    for _ in range(WARM_UP):
        step.run(batch)
    seconds = _time(step, batch, count)
    peak = peak_memory(device)  # before the profiler adds what it notes
    clock = _Clock(device)
    step.mark = clock.mark
    for _ in range(count):
        dist.barrier()
        step.run(batch)
        clock.mark(0, "")
    step.mark = lambda number, part: None
    parts = {name: total / count for name, total in clock.parts.items()}
    mine = (seconds, parts, _kernels(step, batch), peak)
    step.optimizer.settle()
    ranks = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    times, by_part, by_kernel, memory = zip(*ranks, strict=True)
    return Steps([max(rank) for rank in zip(*times, strict=True)], _mean(by_part), _mean(by_kernel), max(memory))


def _time(step: TrainStep, batch: Batch, count: int) -> list[float]:
    """Seconds of each of so many steps, one behind the other as in training: what a step leaves for the next, such as
    weights on their way, is paid for there."""
    seconds = []
    dist.barrier()
    before = time.perf_counter()
    for _ in range(count):
        step.run(batch)
        if step.mesh.device.type == "cuda":
            torch.cuda.synchronize(step.mesh.device)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds


def _mean(ranks: tuple[dict[str, float], ...]) -> dict[str, float]:
    """The mean of each key's values, 0 where a rank has none, in the order of their first appearance."""
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    return {key: fmean(rank.get(key, 0.0) for rank in ranks) for key in keys}


def _kernels(step: TrainStep, batch: Batch) -> dict[str, float]:
    """Seconds of a step in kernels, by kind."""
    cuda = step.mesh.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        step.run(batch)
        if cuda:
            torch.cuda.synchronize(step.mesh.device)
    kinds: defaultdict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if event.device_type.name == "CPU":  # an operation; on a GPU its kernels' time is counted with it
            micros = event.self_device_time_total if cuda else event.self_cpu_time_total
            if kind := kernel_kind(event.key):
                kinds[kind] += micros / 1e6
    return {kind: kinds[kind] for kind in ("matmul", "attention", "communication", "other kernels") if kinds[kind]}


def kernel_kind(name: str) -> str | None:
    """What an operation of torch's profiler is for; None: no kernel of this rank's device."""
    if name.startswith("nccl:"):
        return "communication"
    if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise"):
        return "matmul"
    if "attention" in name and name.startswith("aten::"):
        return "attention"
    return "other kernels" if name.startswith(("aten::", "triton_", "cpp_fused")) else None
