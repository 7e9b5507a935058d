"""Make a model for both generators, and measure them in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.generate.work import MADE, PROMPT, Grid
from benchmarks.llama import Shape
from benchmarks.peers.measure import ROOT, cpu_model
from benchmarks.peers.work import threads
from tplaunch.machine import count_cores

PATIENCE_S = 900


def make_model(shape: Shape, dtype: str, folder: Path) -> None:
    """Random weights: `theirs` for transformers, and a checkpoint of the same, `ours`.

    Args:
        dtype: torch's name.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tplaunch.huggingface.folder import import_folder

    torch.manual_seed(1)
    config = shape.transformers()
    config.max_position_embeddings, config.use_cache = PROMPT + MADE, True
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder / "theirs")
    import_folder(folder / "theirs", folder / "ours")


def measure(model: Path, grid: Grid, rounds: int) -> list[dict[str, Any]]:
    """Lines of results, without what was asked for.

    Args:
        model: what `make_model` made.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(threads(grid.ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    python = [sys.executable]
    if grid.ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        python += ["--nproc-per-node", str(grid.ranks)]
    output = model / "result.json"
    words = ["--model", str(model), "--grid", f"{grid.tp},{grid.pp}", "--rounds", str(rounds), "--output", str(output)]
    line = [*python, "-m", "benchmarks.generate.driver", *words]
    done = subprocess.run(line, env=environment, cwd=ROOT, timeout=PATIENCE_S, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    machine = {"cpu": cpu_model(), "cores": count_cores(), "threads": threads(grid.ranks)}
    return [{**machine, **found} for found in json.loads(output.read_text())]
