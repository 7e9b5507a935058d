"""Starts a bench on this machine: torchrun on a run directory that is gone afterwards. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tplaunch.check import Checked
from tplaunch.errors import Problem, TplaunchError
from tplaunch.hardware import Gpu
from tplaunch.launch.prepare import write_recipe
from tplaunch.launch.torchrun import torchrun_argv, torchrun_environment
from tplaunch.rundir import RunDir


@dataclass(frozen=True)
class Bench:
    """What was measured; see `tplaunch.bench.steps.Steps`.

    Args:
        gpu: the machine, where it was asked for.
    """

    seconds: list[float]
    parts: dict[str, float]
    kernels: dict[str, float]
    peak_memory: float
    gpu: Gpu | None


def run_bench(checked: Checked, *, steps: int, calibrate: bool) -> Bench:
    """Measure a recipe's steps on this machine, on random tokens.

    Args:
        checked: of one node.
        steps: how many are timed.
        calibrate: whether to measure what the machine can do, too.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    ranks = checked.topology.world_size
    with tempfile.TemporaryDirectory(prefix="tplaunch-bench-") as folder:
        run_dir = RunDir(Path(folder))
        run_dir.create()
        write_recipe(checked, run_dir)
        (run_dir.root / "request.json").write_text(json.dumps({"steps": steps, "calibrate": calibrate}))
        environment = torchrun_environment(ranks, attempt=1, resume="none", grace_s=5, one_node=True)
        argv = torchrun_argv(run_dir.root, ranks, module="tplaunch.bench.worker")
        # Kept from the terminal unless it is needed: torch's profiler reports its stages there.
        done = subprocess.run(argv, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise TplaunchError(Problem("the bench failed", why="a rank ended with an error, which is shown above"))
        result = json.loads((run_dir.root / "result.json").read_text())
    return Bench(**result["steps"], gpu=Gpu(**result["gpu"]) if result["gpu"] else None)
