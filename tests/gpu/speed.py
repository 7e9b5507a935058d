"""How fast one contender trains one shape on one GPU.

    python -m tests.gpu.speed SHAPE CONTENDER FILE

Master weights, gradients and AdamW's state in fp32 (transformers: fp32 parameters under autocast), matmuls in bf16,
gradients clipped. Writes a JSON object: tokens/s, MFU where the GPU is known, peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.llama import Shape
from tests.gpu.alone import alone
from tests.gpu.machine import choose, take_device
from tests.gpu.shapes import SHAPES
from tests.gpu.titan import titan
from tests.recipes import resolved
from tplaunch.spec.flops import model_flops_per_token
from tplaunch.spec.gpu import detect_gpu
from tplaunch.train.memory import peak_memory

WARM_UP, STEPS = choose((4, 12), (2, 3))


def ours(shape: Shape, device: torch.device, *, compile_: bool) -> Callable[[], object]:
    """tplaunch's step."""
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import random_batch
    from tplaunch.train.step import TrainStep

    recipe = resolved(shape.recipe({"dp": 1}, {"precision": "bf16", "compile": compile_}))
    step = TrainStep(recipe, Mesh.of(recipe, device))
    batch = random_batch(recipe, 1, True).pinned_for(device)
    return lambda: step.run(batch)


def transformers(shape: Shape, device: torch.device, *, compile_: bool) -> Callable[[], object]:
    """The step that a reader of transformers' documentation writes, with the fused optimizer."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(shape.transformers()).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(shape.vocab, (shape.batch, shape.seq))
    tokens = tokens.pin_memory() if device.type == "cuda" else tokens
    forward = torch.compile(model) if compile_ else model

    def step() -> float:
        data = tokens.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=data, labels=data).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


CONTENDERS: dict[str, Callable[[Shape, torch.device], Callable[[], object]]] = {
    "tplaunch": lambda shape, device: ours(shape, device, compile_=False),
    "tplaunch-compile": lambda shape, device: ours(shape, device, compile_=True),
    "transformers": lambda shape, device: transformers(shape, device, compile_=False),
    "transformers-compile": lambda shape, device: transformers(shape, device, compile_=True),
    "torchtitan-compile": lambda shape, device: titan(shape, device),
}


def measure(shape: Shape, contender: str) -> dict[str, float]:
    """Time steps, one behind the other as in training: from one return to the next."""
    device = take_device()
    began = time.perf_counter()
    step = CONTENDERS[contender](shape, device)
    times = []
    for number in range(WARM_UP + STEPS):
        step()
        if device.type == "cuda" and number in (0, WARM_UP - 1, WARM_UP + STEPS - 1):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    first = times[0] - began
    seconds = [after - before for before, after in pairwise(times[WARM_UP - 1 :])]
    rate = shape.tokens / fmean(seconds)
    found = {
        "tokens_per_s": rate,
        "step_s": fmean(seconds),
        "median_step_s": median(seconds),
        "spread": max(seconds) / min(seconds) - 1,
        "peak_gib": peak_memory(device) / 2**30,
        "to_first_step_s": first,
    }
    gpu = detect_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is not None:
        model = resolved(shape.recipe({"dp": 1}, {})).model
        found["mfu"] = rate * model_flops_per_token(model, shape.seq) / gpu.peak["bf16"]
    return found


def main(shape: str, contender: str, file: str) -> None:
    with alone():
        Path(file).write_text(json.dumps(measure(SHAPES[shape], contender)))


if __name__ == "__main__":
    main(*sys.argv[1:])
