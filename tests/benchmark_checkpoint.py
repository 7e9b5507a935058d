"""How long training stands still for an asynchronous save, against a synchronous one of the same state.

    python tests/benchmark_checkpoint.py [FOLDER]

One process; parameters and AdamW state of 0.9 GB; saves of both kinds in turn, with training in between, on the disk
that holds FOLDER. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time

import torch.distributed as dist

from tests.recipes import case
from tests.training import train, trainer
from tplaunch.spec.checkpoint import checkpoint_bytes

ROUNDS = 4
MODEL = {"hidden_size": 768, "ffn_hidden_size": 3072, "num_layers": 8, "num_heads": 12, "num_kv_heads": 12}


def main(folder: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    recipe = case(model=MODEL, training={"global_batch_size": 2})
    made = trainer({**recipe, "checkpoint": {"keep": 1}, "logging": {"wandb": {"mode": "disabled"}}}, folder)
    stalls: dict[bool, list[float]] = {True: [], False: []}
    saves: dict[bool, list[float]] = {True: [], False: []}
    steps: dict[bool, list[float]] = {True: [], False: []}  # the first after a save: one that is done, one under way
    for turn in range(2 * ROUNDS + 2):
        wait = turn % 2 == 1
        train(made, 1)
        made.save(wait=wait)
        began = time.perf_counter()
        train(made, 1)
        steps[wait].append(time.perf_counter() - began)
        made.checkpoints.finish()
        timings = made.checkpoints.take_timings()
        if turn >= 2:  # the first of each kind also makes the staging buffers
            stalls[wait].append(timings["checkpoint/stall_s"])
            saves[wait].append(timings["checkpoint/save_s"])
    synchronous, asynchronous = (statistics.median(stalls[wait]) for wait in (True, False))
    report = {
        "bytes": checkpoint_bytes(made.checkpoints.recipe),
        "synchronous_s": synchronous,
        "asynchronous_stall_s": asynchronous,
        "ratio": asynchronous / synchronous,
        "step_s": {"during a save": statistics.median(steps[False]), "else": statistics.median(steps[True])},
        "all": {"synchronous_s": stalls[True], "asynchronous_stall_s": stalls[False], "asynchronous_s": saves[False]},
    }
    print(json.dumps(report, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
