"""What each process of a measurement runs: both generators in turns, round by round, at every batch size."""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils import logging

from benchmarks.generate.engines import Run, ours, theirs
from benchmarks.generate.work import BATCHES, MADE, OURS, PROMPT, Grid, engines
from tplaunch import __version__


def main() -> None:
    """Measure, and write a line a round, generator and batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="holds `theirs`, a Hugging Face folder, and `ours`")
    parser.add_argument("--grid", type=Grid.parse, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    runs: dict[str, Run] = {
        engine: ours(given.model / "ours", given.grid) if engine == OURS else theirs(given.model / "theirs")
        for engine in engines(given.grid)
    }
    vocab = json.loads((given.model / "theirs" / "config.json").read_text())["vocab_size"]
    versions = {OURS: __version__, "torch": version("torch"), "transformers": version("transformers")}
    lines = []
    for batch in BATCHES:
        prompts = torch.randint(1, vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        for run in runs.values():
            run(prompts, 4)  # warms
        for _ in range(given.rounds):
            found: dict[str, list[list[int]]] = {}
            for engine, run in runs.items():
                load = os.getloadavg()[0]
                found[engine], reading, making = run(prompts, MADE)
                rates = {"read": batch * PROMPT / reading, "made": batch * (MADE - 1) / making}
                lines.append({"engine": engine, "batch": batch, **rates, "load": load, "versions": versions})
            same = sum(
                a == b for rows in zip(*found.values(), strict=True) for a, b in zip(rows[0], rows[-1], strict=True)
            )
            for line in lines[-len(runs) :]:
                line["same"] = same / (batch * MADE)
    if dist.get_rank() == 0:
        given.output.write_text(json.dumps(lines))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
