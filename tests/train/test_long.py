"""Long samples on a CPU: memory grows with their length, and documents make steps quicker.

`python -m tests.train.test_long` prints the tables; another trains in a process of its own for each number.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.recipes import resolved

MODEL = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_hidden_size": 768,
    "vocab_size": 8192,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": {"training": {"document_mask": True}},
    "window": {"model": {"window": 1024, "window_layers": ["window", "full"], "attention_sinks": True}},
}


def train(kind: str, seq_len: int, steps: int) -> dict[str, float]:
    """Steps of one sample, of documents of an eighth of it; in this process, which must have done nothing before."""
    import torch
    import torch.distributed as dist

    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import Batch
    from tplaunch.train.step import TrainStep

    more = KINDS[kind]
    training = {"seq_len": seq_len, "global_batch_size": 1, "steps": steps, "precision": "fp32"}
    recipe = resolved(
        {
            "name": "long",
            "model": {**MODEL, **more.get("model", {})},
            "topology": {"dp": 1},
            "training": {**training, **more.get("training", {})},
            "data": {"train": "unused"},
        }
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    row = torch.randint(MODEL["vocab_size"], (1, seq_len + 1))
    places = (torch.arange(seq_len) % (seq_len // 8))[None]
    made = TrainStep(recipe, Mesh.of(recipe, torch.device("cpu")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, cpu, losses = [], [], []
    for _ in range(steps):
        began, busy = time.perf_counter(), time.process_time()
        positions = places if kind == "documents" else None
        losses.append(made.run(Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), positions)).loss)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - busy)
    assert steps == 1 or losses[-1] < losses[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.destroy_process_group()
    return {
        "seconds": min(seconds),
        "cpu_seconds": min(cpu),
        "peak_mib": peak / 1024,
        "grown_mib": (peak - before) / 1024,
    }


def alone(kind: str, seq_len: int, steps: int = 2) -> dict[str, float]:
    """`train` in a process of its own."""
    command = [sys.executable, "-m", "tests.train.test_long", kind, str(seq_len), str(steps)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_sequence_and_not_with_its_square(kind: str) -> None:
    short, long = (alone(kind, seq_len)["grown_mib"] for seq_len in (4096, 16384))
    assert long < 4.4 * short  # a mask alone would be 256 MiB


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(train(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        for seq_len in (4096, 8192, 16384, 32768):
            for kind in KINDS:
                found = alone(kind, seq_len, steps=2 if seq_len < 10_000 else 1)
                print(seq_len, kind, *(f"{name} {value:.1f}" for name, value in found.items()), flush=True)
