"""Everything that needs a GPU, in one call of less than nine minutes on a machine with one and nothing but torch and
transformers:

    python tests/gpu/run.py wheels DIR [--python 3.12]      where there is a package index: fill DIR
    OUT=results python tests/gpu/run.py [--wheels DIR] [--cpu] [--only PART,PART]

Most telling first, each part under a time limit of its own; after each, $OUT/results.json (by default in ./gpu-results)
holds all that is known. Without a GPU, or with --cpu, the CPU stands in: the same code on small shapes. Ends with a
table, and with 1 when a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu import report  # noqa: E402 (from this folder, wherever the script is called)
from tests.gpu.report import Outcome  # noqa: E402

TOTAL_S = 520
SHORT_S = 20  # less is not worth a start
CPU_S = 600  # for each part, where the CPU stands in


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        limit_s: seconds after which it is ended.
        argv: after `python -m`; FIGURES, the words of SHAPE_OF, and OUT stand for the folder or file of its
            figures, the shapes to measure and the folder of results.
    """

    name: str
    limit_s: int
    argv: tuple[str, ...]


SHAPE_OF = {"1b": "SHAPE1", "3b": "SHAPE3", "moe": "SHAPE_EXPERTS"}


def _tests(name: str, limit_s: int) -> Part:
    options = ("-m", "gpu", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider")
    return Part(name, limit_s, ("pytest", *options, f"tests/gpu/test_{name}.py"))


def _speed(shape: str, contender: str, limit_s: int) -> Part:
    argv = ("tests.gpu.speed", SHAPE_OF[shape], contender, "FIGURES")
    return Part(f"{shape} {contender}", limit_s, argv)


def _look(contender: str, limit_s: int, shape: str = "1b") -> Part:
    name = f"look {contender}" if shape == "1b" else f"look {shape} {contender}"
    return Part(name, limit_s, ("tests.gpu.look", SHAPE_OF[shape], contender, "OUT", "FIGURES"))


TESTED = ("parity", "memory", "topologies", "kernels", "experts", "models", "checkpoint", "launch")
# Parts of a stage run at once, on a GPU: tests, whose times nobody reads.
STAGES = (
    (_speed("1b", "tplaunch", 60),),
    (_look("tplaunch", 60),),
    tuple(_tests(name, 200) for name in TESTED),
    (_speed("1b", "transformers-compile", 90),),
    (_speed("1b", "tplaunch-compile", 90),),
    (_look("tplaunch-compile", 90),),
    (_speed("moe", "tplaunch", 60),),
    (_look("tplaunch", 60, "moe"),),
    (_speed("moe", "transformers", 90),),
    (_tests("bench", 60),),
    (_speed("3b", "tplaunch", 60),),
    (_speed("3b", "transformers-compile", 120),),
    (_speed("3b", "tplaunch-compile", 90),),
    (_speed("1b", "transformers", 60),),
    (_speed("1b", "torchtitan-compile", 60),),
    (_speed("3b", "torchtitan-compile", 90),),
)


def run_part(part: Part, out: Path, *, cpu: bool, limit_s: float) -> Outcome:
    """Run one part and read what it measured; its output is in OUT/<part>.log."""
    stem = part.name.replace(" ", "-")
    folder = out / f"{stem}.figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    shapes = {word: ("tiny-moe" if name == "moe" else "tiny") if cpu else name for name, word in SHAPE_OF.items()}
    places = {**shapes, "OUT": str(out), "FIGURES": str(folder / "measured.json")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": path, report.FIGURES: str(folder)}
    began = time.monotonic()
    log = out / f"{stem}.log"
    with log.open("w") as file:
        words = [sys.executable, "-m", *(places.get(word, word) for word in part.argv)]
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            result = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = "timed out"
        finally:
            _end(process)
    figures = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    said = log.read_text(errors="replace")
    skipped = sorted(set(re.findall(r"^SKIPPED .*", said, re.MULTILINE)))
    if result == "passed" and skipped and not re.search(r"\d+ passed", said):
        result = "not measured"
    why = skipped if result in ("passed", "not measured") else said.splitlines()[-40:]
    return Outcome(part.name, result, time.monotonic() - began, figures, "\n".join(why))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process group; what it started in sessions of its own dies with its parent."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def facts() -> dict[str, str]:
    """What the numbers belong to. torch is asked in a process of its own: this one must not hold a GPU's memory."""
    code = (
        "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    version, device = said.strip().splitlines()[-1].split(" ", 1)
    found = {"device": device, "python": platform.python_version(), "torch": version}
    for name in ("transformers", "torchtitan"):
        found[name] = metadata.version(name) if find_spec(name) else "not installed"
    return found


def run_all(only: list[str], wheels: Path | None, *, cpu: bool) -> int:
    """Run the parts, write and print the report; the exit code."""
    began = time.monotonic()
    out = Path(os.environ.get("OUT", "gpu-results")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if wheels is not None:
        from tests.gpu.wheels import install

        install(wheels)
    from tplaunch.machine import count_gpus

    cpu = cpu or count_gpus() == 0
    if cpu:  # for this process and all parts
        os.environ |= {"TPLAUNCH_GPU_STAND_IN": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    known, outcomes = facts(), list[Outcome]()

    def attempt(part: Part) -> Outcome:
        left = TOTAL_S - (time.monotonic() - began)
        if "torchtitan" in part.name and (cpu or not find_spec("torchtitan")):
            return Outcome(part.name, "not measured", said="its kernels need a GPU" if cpu else "it is not installed")
        if not cpu and left < SHORT_S:
            return Outcome(part.name, "left out")
        return run_part(part, out, cpu=cpu, limit_s=CPU_S if cpu else min(part.limit_s, left))

    for stage in STAGES:
        chosen = [part for part in stage if not only or part.name in only]
        with ThreadPoolExecutor(1 if cpu else len(stage)) as pool:
            for outcome in pool.map(attempt, chosen):
                outcomes.append(outcome)
                print(f"{outcome.part}: {outcome.result}, {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
                report.write(out, known, outcomes)
    text = report.table(known, outcomes)
    (out / "table.txt").write_text(text + "\n")
    print(text)
    return int(any(one.result in ("failed", "timed out") for one in outcomes))


def main() -> int:
    if sys.argv[1:2] == ["wheels"]:
        parser = argparse.ArgumentParser(prog="run.py wheels")
        parser.add_argument("folder", type=Path)
        parser.add_argument("--python", default="3.12", metavar="VERSION")
        given = parser.parse_args(sys.argv[2:])
        from tests.gpu.wheels import download

        download(given.folder, given.python)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install from there first what is missing")
    parser.add_argument("--cpu", action="store_true", help="let the CPU stand in")
    parser.add_argument(
        "--only", default="", metavar="PART,PART", help=", ".join(part.name for stage in STAGES for part in stage)
    )
    given = parser.parse_args()
    return run_all([name for name in given.only.split(",") if name], given.wheels, cpu=given.cpu)


if __name__ == "__main__":
    sys.exit(main())
