"""Measure one trainer at one shape and topology: start it, wait, and read what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.llama import Shape
from benchmarks.peers.work import EARLIER, LEARNING_RATE, OURS, SHAPES, WEIGHT_DECAY, Grid, cannot, threads
from tplaunch import __version__
from tplaunch.machine import count_cores

ROOT = Path(__file__).parents[2]
PATIENCE_S = 900


def measure(
    trainer: str, shape: str, grid: Grid, steps: int, venv: Path, earlier: Path | None = None
) -> dict[str, Any]:
    """One line of the results: the seconds of each step by its slowest rank, the bytes of resident memory that the
    largest rank had at most, and what it ran on; or `failed`, with the reason.

    Args:
        venv: the other trainers' virtual environment.
        earlier: a checkout of tplaunch as it was, for the trainer `EARLIER`.
    """
    started_with = os.getloadavg()[0]
    what = {"trainer": trainer, "shape": shape, "grid": list(grid)}
    machine = {
        "cpu": cpu_model(),
        "cores": count_cores(),
        "load": started_with,
        "first": comes_first(),
        "threads": threads(grid.ranks),
    }
    if reason := cannot(trainer, shape, grid):
        return {**what, "failed": reason}
    root = checkout(trainer, earlier)
    environment = environment_of(grid, root)
    if trainer in (OURS, EARLIER):
        found = attempt(lambda: _ours(SHAPES[shape], grid, steps, environment, root))
    else:
        found = attempt(lambda: run_other(trainer, shape, grid, steps, environment, venv))
    return {**what, **({} if "failed" in found else machine), **found}


def checkout(trainer: str, earlier: Path | None) -> Path:
    """Where the modules of a trainer's processes are: of tplaunch as it was in `earlier`, of all others here."""
    return earlier if trainer == EARLIER and earlier is not None else ROOT


def comes_first() -> bool:
    """Whether what is measured comes before all other work of the machine: at real-time priority."""
    return os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)


def attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, or `failed`, with the reason, where a program failed."""
    try:
        return measured()
    except subprocess.TimeoutExpired as error:
        return {"failed": f"it did not end within {error.timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
        return {"failed": _last_error(error.stderr)}


def environment_of(grid: Grid, root: Path = ROOT) -> dict[str, str]:
    """What every trainer's processes find in their environment.

    Args:
        root: the checkout whose modules they import.
    """
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(threads(grid.ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _ours(shape: Shape, grid: Grid, steps: int, environment: dict[str, str], root: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(yaml.safe_dump(our_recipe(shape, grid)))
        line = [sys.executable, "-m", "tplaunch", "bench", str(recipe), "--steps", str(steps), "--json"]
        answer = json.loads(run_program(line, environment, root))
    versions = {"tplaunch": __version__, "torch": version("torch")}
    figures = {key: answer[key] for key in ("seconds", "peak_memory", "kernels")}
    return {**figures, "versions": versions}


def our_recipe(shape: Shape, grid: Grid) -> dict[str, Any]:
    """The recipe of the work. Gradients are not clipped, nor is the optimizer's state sharded: the others do not."""
    training = {"precision": "fp32", "grad_clip": None}
    optimizer = {"optimizer": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}}
    sizes = {axis: size for axis, size in grid._asdict().items() if axis != "ep" or size > 1}  # earlier ones knew no ep
    return shape.recipe({**sizes, "zero": 0}, training) | optimizer


def run_other(
    trainer: str, shape: str, grid: Grid, steps: int, environment: dict[str, str], venv: Path
) -> dict[str, Any]:
    """What the driver of another trainer leaves (`driver.measure`).

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired: it failed.
    """
    python = str(venv / "bin" / "python")
    start = torchrun(python, grid) if grid.ranks > 1 else [python]
    module = f"benchmarks.peers.{trainer.partition('-')[0]}"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        words = ["--shape", shape, "--grid", ",".join(map(str, grid)), "--steps", str(steps), "--output", str(output)]
        run_program([*start, "-m", module, *words], environment)
        return json.loads(output.read_text())


def torchrun(python: str, grid: Grid) -> list[str]:
    """The line that starts a program on each rank of this machine, up to the program."""
    where = ["--standalone", "--local-addr", "127.0.0.1"]
    return [python, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(grid.ranks)]


def run_program(line: list[str], environment: dict[str, str], root: Path = ROOT) -> str:
    """Run a command in a checkout, and return what it prints.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took longer than `PATIENCE_S`.
    """
    done = subprocess.run(
        line, check=True, capture_output=True, text=True, env=environment, cwd=root, timeout=PATIENCE_S
    )
    return done.stdout


def _last_error(stderr: str) -> str:
    """The first line that names an exception: those after it are the launcher's."""
    lines = [line.split("]:")[-1].strip() for line in stderr.splitlines()]
    return next((line for line in lines if "Error: " in line), "it failed without a word")


def cpu_model() -> str:
    """What the CPU is called."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
