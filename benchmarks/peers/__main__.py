"""The command line of the comparison; see the package."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import measure
from benchmarks.peers.start import measure_start
from benchmarks.peers.table import page
from benchmarks.peers.work import BARE, EARLIER, SHAPES, TRAINERS, Grid, grids

# megatron-core and torchtitan ask for packages that nothing here uses: they come without theirs.
PACKAGES = ["torch==2.13.0", "transformers", "numpy", "einops", "tyro", "datasets<4.8", "tensorboard", "torchdata"]
WITHOUT_REQUIREMENTS = ["torchtitan==0.2.2", "megatron-core==0.16.1"]


def set_up(folder: Path) -> None:
    """Make the virtual environment of the other trainers, from the package index that pip is set up for."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "-q"]
    subprocess.run([*pip, *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", *WITHOUT_REQUIREMENTS], check=True)


def run(arguments: argparse.Namespace) -> None:
    """Measure everything in turn, round by round, so that what else the machine does meets all alike."""
    for _ in range(arguments.rounds):
        for shape in arguments.shape:
            for grid in arguments.topologies or grids(shape):
                for trainer in _trainers(arguments):
                    result = measure(trainer, shape, grid, arguments.steps, arguments.venv, arguments.earlier)
                    said = result.get("failed") or f"{min(result['seconds']):.3f} s at best"
                    _keep(result, arguments.output, f"{shape} {grid} {trainer}: {said}")


def start(arguments: argparse.Namespace) -> None:
    """Measure in turn how soon each trainer has done its first step."""
    for _ in range(arguments.rounds):
        for trainer in [BARE, *_trainers(arguments)]:
            result = measure_start(trainer, arguments.venv, arguments.earlier)
            said = result.get("failed") or f"{result['start']:.2f} s"
            _keep(result, arguments.output, f"start of {trainer}: {said}")


def _trainers(arguments: argparse.Namespace) -> list[str]:
    return [*arguments.trainers, *([EARLIER] if arguments.earlier else [])]


def _keep(result: dict[str, Any], output: Path, said: str) -> None:
    with output.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(said, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("setup", help="make a virtual environment for the other trainers")
    command.add_argument("folder", type=Path)
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--venv", type=Path, required=True, help="what setup made")
    measured.add_argument("--output", type=Path, required=True)
    measured.add_argument("--rounds", type=int, default=3)
    measured.add_argument("--trainers", choices=TRAINERS, nargs="+", default=TRAINERS)
    measured.add_argument("--earlier", type=Path, help="a checkout of tplaunch as it was, measured beside it")
    command = commands.add_parser("run", parents=[measured], help="measure steps; append a line for each to a file")
    command.add_argument("--steps", type=int, default=8)
    command.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    command.add_argument("--topologies", type=Grid.parse, nargs="+", metavar="TP,PP,DP[,EP]")
    commands.add_parser("start", parents=[measured], help="measure the time to the first step, likewise")
    command = commands.add_parser("table", help="make the page of the results")
    command.add_argument("results", type=Path)
    command.add_argument("--earlier", type=Path, help="results of tplaunch and of an earlier one beside it")
    command.add_argument("--start", type=Path, help="results of start")
    arguments = parser.parse_args()
    if arguments.command == "setup":
        set_up(arguments.folder)
    elif arguments.command == "run":
        run(arguments)
    elif arguments.command == "start":
        start(arguments)
    else:
        print(page(*map(_lines, (arguments.results, arguments.earlier, arguments.start))), end="")


def _lines(file: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file is not None else []


if __name__ == "__main__":
    main()
