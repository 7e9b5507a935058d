"""Measure the machine that a world of ranks runs on, as a `Gpu` that the planner takes: what kernels and links reach
while all ranks are at work.

The planner's matmul_efficiency is that of training steps. What a single matmul reaches here is an upper bound of it:
on A100 and H100 training steps reach 0.75 to 0.86 of it (see `tplaunch.spec.gpu`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tplaunch.kernels.matmul import matmul
from tplaunch.spec.gpu import Gpu, detect_gpu

_SECONDS = 0.2  # that one measurement runs for
_PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def calibrate(device: torch.device) -> Gpu:
    """Measure this world, which is on one node. Every rank must call it; all get the same answer.

    On a GPU of the table its peaks stay, and the efficiencies say what of them was reached; elsewhere the peaks are
    what was reached. The network is not measured.

    Args:
        device: this rank's device.
    """
    known = detect_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    world, latency = dist.get_world_size(), _seconds(partial(torch.zeros(8, device=device).add_, 1.0), device)
    reached = {name: _matmul_rate(dtype, device) for name, dtype in _PRECISIONS.items()}
    attention = _attention_rate(torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    large = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    memory_bandwidth = 2 * large.nbytes / _seconds(partial(large.add_, 1.0), device)
    link_bandwidth, link_latency = _link(device) if world > 1 else (memory_bandwidth, latency)
    measured = Gpu(
        name="measured",
        peak=reached,
        memory=_memory(device),
        memory_bandwidth=memory_bandwidth,
        node_size=world,
        link_bandwidth=link_bandwidth,
        network_bandwidth=link_bandwidth,
        power=0.0,
        matmul_efficiency=1.0,
        attention_efficiency=attention / reached["bf16" if device.type == "cuda" else "fp32"],
        link_efficiency=1.0,
        memory_efficiency=1.0,
        link_latency=link_latency,
        network_latency=link_latency,
        kernel_latency=latency,
    )
    if known is None:
        return measured
    if world > 1:
        link = link_bandwidth / known.link_bandwidth
        known = replace(known, link_efficiency=link, link_latency=link_latency)
    return replace(
        known,
        matmul_efficiency=reached["bf16"] / known.peak["bf16"],
        attention_efficiency=attention / known.peak["bf16"],
        memory_efficiency=memory_bandwidth / known.memory_bandwidth,
        memory=measured.memory,
        kernel_latency=latency,
    )


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a matmul of a size that training has."""
    size = 4096 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _seconds(partial(matmul, a, b), device)


def _attention_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of causal attention, of which half the scores count."""
    heads, length, width = (32, 4096, 128) if device.type == "cuda" else (8, 256, 64)
    q = torch.randn(1, heads, length, width, device=device, dtype=dtype)
    flops = 4.0 * heads * width * length**2 / 2
    return flops / _seconds(partial(F.scaled_dot_product_attention, q, q, q, is_causal=True), device)


def _link(device: torch.device) -> tuple[float, float]:
    """(bytes/s one way, seconds of a hop), from a small and a large all-reduce over the world, taken as rings."""
    world = dist.get_world_size()
    small, large = (torch.zeros(count, device=device) for count in (8, 2**24 if device.type == "cuda" else 2**18))
    short, long = (_seconds(partial(dist.all_reduce, tensor), device) for tensor in (small, large))
    moved = 2 * (world - 1) / world * large.nbytes
    return moved / max(long - short, 0.1 * long), short / (2 * (world - 1))


def _memory(device: torch.device) -> int:
    """Bytes that a rank may hold: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.get_world_size()


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the slowest rank, the quicker of two measurements; every rank makes as many calls."""

    def timed(calls: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return _slowest((time.perf_counter() - start) / calls, device)

    timed(2)
    calls = max(3, int(_SECONDS / timed(3)))
    return min(timed(calls), timed(calls))


def _slowest(seconds: float, device: torch.device) -> float:
    value = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)
