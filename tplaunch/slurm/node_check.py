"""Is this node fit to train on? On each node, before the ranks start: `python -m tplaunch.slurm.node_check RUN_DIR`.

Prints one line of JSON: the node's name and place in the network, and what is wrong with it. Checked are the run
directory and the temporary directory (writable), the number of GPUs, their ECC and clock state by nvidia-smi, and,
where there are GPUs, by a short matmul on each (right, and none much slower than its neighbours) and an all-reduce
over all. The expected number of GPUs is Slurm's own (SLURM_GPUS_ON_NODE).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GPU_SECONDS = 180.0  # a healthy node needs the import of torch and a few seconds; one that hangs is not healthy
SLOW = 0.7  # a GPU below this part of its neighbours' median speed is a bad one
_MATMUL = 4096

# What nvidia-smi is asked: the option, the field that names the GPU, and the others with what it means when their value
# is not one of _WELL. (clocks_throttle_reasons is called clocks_event_reasons in new drivers, which know both.)
_QUERIES = (
    (
        "--query-gpu",
        "index",
        {
            "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the last reset",
            "clocks_throttle_reasons.hw_slowdown": "the hardware slows its clock down (heat or power)",
        },
    ),
    (
        "--query-remapped-rows",
        "gpu_bus_id",
        {
            "remapped_rows.pending": "memory rows wait to be remapped: reset the GPU",
            "remapped_rows.failure": "memory rows cannot be remapped",
        },
    ),
)
_WELL = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]")


@dataclass(frozen=True)
class Report:
    """A node and what is wrong with it.

    Args:
        node: Slurm's name of it.
        address: its switches and itself, outermost first, as Slurm's topology plugin says ("s0.s2.n3").
        problems: nothing where it is fit.
    """

    node: str
    address: str
    problems: list[str]


def main(run_dir: Path) -> None:
    environ = os.environ
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    # Not tempfile.gettempdir(), which passes over a TMPDIR that cannot be used.
    problems = check_disks([run_dir, Path(environ.get("TMPDIR", "/tmp"))])
    problems += check_gpus(expected_gpus(environ))
    report = Report(node, environ.get("SLURM_TOPOLOGY_ADDR", node), problems)
    # One write, so that the lines of many nodes do not mix.
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    sys.stdout.flush()


def expected_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that Slurm has given to the job on this node."""
    return int(environ.get("SLURM_GPUS_ON_NODE", "0"))


def check_disks(folders: list[Path]) -> list[str]:
    """Can a file be written, made durable and read back in each folder?"""
    problems = []
    for folder in folders:
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".node-check-") as file:
                data = os.urandom(1 << 20)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if Path(file.name).read_bytes() != data:
                    problems.append(f"{folder} gives back other bytes than were written")
        except OSError as error:
            problems.append(f"{folder} cannot be written: {error.strerror}")
    return problems


def check_gpus(expected: int) -> list[str]:
    """State by nvidia-smi, then arithmetic in a process of its own: a broken GPU may hang whoever touches it."""
    if expected == 0 or shutil.which("nvidia-smi") is None:
        return []
    problems = check_gpu_state(expected)
    if problems:
        return problems
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from tplaunch.slurm.node_check import compute; compute()"],
            capture_output=True,
            text=True,
            timeout=GPU_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [f"a matmul and an all-reduce did not end within {GPU_SECONDS:.0f} s"]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"a matmul or an all-reduce failed: {last}"]
    return json.loads(done.stdout.splitlines()[-1])


def check_gpu_state(expected: int) -> list[str]:
    """The number of GPUs, their ECC errors, remapped memory and clocks, as nvidia-smi tells."""
    problems = []
    for option, name, meanings in _QUERIES:
        argv = ["nvidia-smi", f"{option}={','.join([name, *meanings])}", "--format=csv,noheader"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return ["nvidia-smi hangs"]
        said = done.stdout + done.stderr
        if done.returncode == 0:
            problems += read_gpu_state(done.stdout, expected, list(meanings.values()))
        elif "not a valid field" not in said:  # a driver that lacks a field is no sign of a sick GPU
            return [f"nvidia-smi failed: {' '.join(said.split())[-200:]}"]
    return list(dict.fromkeys(problems))


def read_gpu_state(csv: str, expected: int, meanings: list[str]) -> list[str]:
    """The problems in the output of nvidia-smi: a line for each GPU, its name and then a value for each meaning."""
    rows = [[cell.strip() for cell in line.split(",")] for line in csv.splitlines() if line.strip()]
    problems = [f"{len(rows)} GPUs of {expected}"] if len(rows) < expected else []
    for name, *values in rows:
        for meaning, value in zip(meanings, values, strict=True):
            if value not in _WELL:
                problems.append(f"GPU {name}: {meaning} ({value})")
    return problems


def compute() -> None:
    """Prints, as a JSON list, what is wrong with the arithmetic of the GPUs and with the links between them."""
    import torch

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    expected = expected_gpus(os.environ)
    problems = [f"torch sees {len(devices)} GPUs of {expected}"] if len(devices) < expected else []
    speeds = {}
    for device in devices:
        seconds, right = time_matmul(device)
        speeds[device.index] = 1 / seconds
        if not right:
            problems.append(f"GPU {device.index}: two equal matmuls differ")
    problems += find_slow(speeds)
    if len(devices) > 1:
        problems += check_all_reduce(devices)
    print(json.dumps(problems))


def time_matmul(device: torch.device, size: int = _MATMUL) -> tuple[float, bool]:
    """Seconds of a bf16 matmul, the best of five, and whether all five gave the same finite bits."""
    import torch

    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator, dtype=torch.bfloat16) for _ in range(2))
    first = a @ b
    right = bool(first.isfinite().all())
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            again = a @ b
            end.record()
            end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
        right = right and bool(torch.equal(first, again))
    return best, right


def find_slow(speeds: Mapping[int, float]) -> list[str]:
    """GPUs that are much slower than the median of the node's."""
    if not speeds:
        return []
    median = statistics.median(speeds.values())
    return [
        f"GPU {index}: {speed / median:.0%} of its neighbours' speed"
        for index, speed in speeds.items()
        if speed < SLOW * median
    ]


def check_all_reduce(devices: list[torch.device]) -> list[str]:
    """A sum over all GPUs of the node by NCCL, from this one process."""
    import torch
    import torch.cuda.nccl

    tensors = [torch.full((1 << 20,), float(i + 1), device=device) for i, device in enumerate(devices)]
    torch.cuda.nccl.all_reduce(tensors)
    expected = sum(range(1, len(devices) + 1))
    return [
        f"GPU {device.index}: an all-reduce gave a wrong sum"
        for device, tensor in zip(devices, tensors, strict=True)
        if not bool((tensor == expected).all())
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
