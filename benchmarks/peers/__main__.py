"""The command line of the comparison; see the package."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers.measure import measure
from benchmarks.peers.table import page
from benchmarks.peers.work import EARLIER, SHAPES, TRAINERS, Grid, grids

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
                for trainer in [*arguments.trainers, *([EARLIER] if arguments.earlier else [])]:
                    result = measure(trainer, shape, grid, arguments.steps, arguments.venv, arguments.earlier)
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                    said = result.get("failed") or f"{min(result['seconds']):.3f} s at best"
                    print(f"{shape} {grid} {trainer}: {said}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("setup", help="make a virtual environment for the other trainers")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("run", help="measure, and append a line a measurement to a file")
    command.add_argument("--venv", type=Path, required=True, help="what setup made")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--steps", type=int, default=8)
    command.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    command.add_argument("--topologies", type=Grid.parse, nargs="+", metavar="TP,PP,DP[,EP]")
    command.add_argument("--trainers", choices=TRAINERS, nargs="+", default=TRAINERS)
    command.add_argument("--earlier", type=Path, help="a checkout of tplaunch as it was, measured beside it")
    command = commands.add_parser("table", help="make the page of the results")
    command.add_argument("results", type=Path)
    command.add_argument("--earlier", type=Path, help="results of tplaunch and of an earlier one beside it")
    arguments = parser.parse_args()
    if arguments.command == "setup":
        set_up(arguments.folder)
    elif arguments.command == "run":
        run(arguments)
    else:
        files = [file for file in (arguments.results, arguments.earlier) if file is not None]
        print(page(*([json.loads(line) for line in file.read_text().splitlines()] for file in files)), end="")


if __name__ == "__main__":
    main()
