"""The command line of the comparison; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.generate.measure import make_model, measure
from benchmarks.generate.table import page
from benchmarks.generate.work import DTYPES, GRIDS, SHAPES, Grid


def run(arguments: argparse.Namespace) -> None:
    """Measure everything, and append a line a round, generator and batch size to a file."""
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            with TemporaryDirectory() as folder:
                make_model(SHAPES[shape], DTYPES[dtype], Path(folder))
                for grid in arguments.topologies:
                    lines = measure(Path(folder), grid, arguments.rounds)
                    with arguments.output.open("a") as file:
                        for line in lines:
                            file.write(json.dumps({"shape": shape, "dtype": dtype, "grid": list(grid), **line}) + "\n")
                    print(f"{shape} {dtype} {grid}: {len(lines)} measurements", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure, and append to a file")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    command.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    command.add_argument("--topologies", type=Grid.parse, nargs="+", metavar="TP,PP", default=GRIDS)
    command = commands.add_parser("table", help="make the page of the results")
    command.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
    else:
        print(page([json.loads(line) for line in arguments.results.read_text().splitlines()]), end="")


if __name__ == "__main__":
    main()
