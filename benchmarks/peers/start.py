"""Measure how long after its command a trainer has done the first step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from benchmarks.peers.measure import (
    attempt,
    checkout,
    comes_first,
    environment_of,
    our_recipe,
    run_other,
    run_program,
    torchrun,
)
from benchmarks.peers.work import BARE, EARLIER, OURS, SHAPES, START_GRID, START_SHAPE, cannot
from tplaunch.data.indexed import IndexedWriter, token_dtype

# What every trainer of several ranks has to do first.
JOIN = """\
import sys, time, torch, torch.distributed
torch.distributed.init_process_group("gloo")
torch.distributed.all_reduce(torch.ones(1))
open(sys.argv[1], "w").write(str(time.time()))
torch.distributed.destroy_process_group()
"""


def measure_start(trainer: str, venv: Path, earlier: Path | None = None) -> dict[str, Any]:
    """One line of the results: `start`, seconds from the command to the end of the first step, or what a bare torchrun
    has in its place: `joined`, to the end of its all-reduce, and `start`, to its own end; or `failed`, with the reason.

    Args:
        venv: the other trainers' virtual environment.
        earlier: a checkout of tplaunch as it was, for the trainer `EARLIER`.
    """
    what = {"trainer": trainer, "shape": START_SHAPE, "grid": list(START_GRID), "first": comes_first()}
    if reason := cannot(trainer, START_SHAPE, START_GRID):
        return {**what, "failed": reason}
    root = checkout(trainer, earlier)
    environment = environment_of(START_GRID, root)
    if trainer == BARE:
        return {**what, **attempt(lambda: _bare(environment))}
    if trainer in (OURS, EARLIER):
        return {**what, **attempt(lambda: _ours(environment, root))}
    return {**what, **attempt(lambda: _other(trainer, environment, venv))}


def _bare(environment: dict[str, str]) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        program, joined = Path(folder, "join.py"), Path(folder, "joined")
        program.write_text(JOIN)
        began = time.time()
        run_program([*torchrun(sys.executable, START_GRID), str(program), str(joined)], environment)
        return {"start": time.time() - began, "joined": float(joined.read_text()) - began}


@contextmanager
def _recipe() -> Iterator[Path]:
    """A recipe of the work that trains one step, with a file of random tokens beside it."""
    shape = SHAPES[START_SHAPE]
    with TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(shape.vocab, size=8 * shape.tokens)
        writer = IndexedWriter(Path(folder, "tokens"), token_dtype(shape.vocab))
        writer.add(tokens)
        writer.end_document()
        writer.compose()
        writer.commit()
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(yaml.safe_dump(our_recipe(shape, START_GRID) | {"data": {"train": str(writer.prefix)}}))
        yield recipe


def _ours(environment: dict[str, str], root: Path) -> dict[str, Any]:
    with _recipe() as recipe:
        run_dir = recipe.parent / "run"
        began = time.time()
        line = [sys.executable, "-m", "tplaunch", "train", str(recipe), "--run-dir", str(run_dir)]
        run_program(line, environment, root)
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        started_up = next(event for event in events if event["event"] == "startup")
        return {"start": started_up["time"] - began, "parts": started_up["seconds"]}


def _other(trainer: str, environment: dict[str, str], venv: Path) -> dict[str, float]:
    began = time.time()
    return {"start": run_other(trainer, START_SHAPE, START_GRID, 1, environment, venv)["first_step"] - began}
