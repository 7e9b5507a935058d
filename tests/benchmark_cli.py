"""How soon the command line answers, beside what importing its libraries alone takes.

    python tests/benchmark_cli.py

Prints one JSON object: for each command the median of its seconds, over rounds in which all commands take turns, and
that median over the libraries'. The first round (caches, .pyc files) does not count.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.made_runs import BEGAN, make_run

ROUNDS = 15
RUNS, RECORDS, CHECKPOINTS = 200, 2000, 100  # of the list; records and checkpoints of each run
# What every recipe needs: a typed command, YAML, one model of pydantic's that has checked something.
LIBRARIES = "import typer, yaml, pydantic; pydantic.TypeAdapter(int).validate_python(1)"
COMMANDS = [
    ["--help"],
    ["recipe", "check", "quickstart"],
    ["train", "quickstart", "--dry-run"],
    ["plan", "quickstart", "--gpu", "h100-80gb"],
    ["plan", "llama3-405b"],
]


def seconds(arguments: list[str]) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - began


def main() -> None:
    programs = {"libraries": ["-c", LIBRARIES]}
    programs |= {" ".join(command): ["-m", "tplaunch", *command] for command in COMMANDS}
    with TemporaryDirectory() as folder:
        make_runs(Path(folder))
        programs[f"runs list, {RUNS} runs"] = ["-m", "tplaunch", "runs", "list", folder]
        measure(programs)


def make_runs(folder: Path) -> None:
    saved = [{"event": "checkpoint", "time": BEGAN + i, "step": i, "seconds": 1.0} for i in range(CHECKPOINTS)]
    end = {"event": "attempt_end", "time": BEGAN + RECORDS, "code": 0, "attempt": 1, "why": "the last step is done"}
    for i in range(RUNS):
        events = [{"event": "attempt", "time": BEGAN, "attempt": 1}, *saved, end]
        make_run(folder / f"run-{i:03d}", records=RECORDS, seed=i, events=events)


def measure(programs: dict[str, list[str]]) -> None:
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 + ROUNDS):
        for name, arguments in programs.items():
            times[name].append(seconds(arguments))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    libraries = medians["libraries"]
    result = {name: {"s": round(s, 3), "of_libraries": round(s / libraries, 2)} for name, s in medians.items()}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
