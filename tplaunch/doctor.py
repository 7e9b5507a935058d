"""`tplaunch doctor`: this machine, and the Slurm cluster it belongs to, asked what a run will ask of them.

Each check yields findings; none changes anything that stays, and none needs torch unless there is a GPU to use.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from tplaunch import __version__
from tplaunch.errors import TplaunchError
from tplaunch.machine import count_cores
from tplaunch.slurm import client
from tplaunch.slurm.nodes import node_reports
from tplaunch.units import format_bytes

SLOW_SYNC_S = 0.1  # a checkpoint syncs one file a rank; slower ones are felt in every save
SKEW_S = 1.0  # logs of different nodes can no longer be put in order
SMALL_SHM = 2**30  # NCCL and data loaders share memory there
FEW_FILES = 4096  # open files: sockets to every rank, checkpoint files, token files
WANDB_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        level: ok; warn: works, but not as well or not for everything; fail: does not work.
        topic: what was looked at.
        text: what was found.
        fix: how to mend it.
    """

    level: Literal["ok", "warn", "fail"]
    topic: str
    text: str
    fix: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """All findings, each as soon as it is there.

    Args:
        folder: where run directories go.
    """
    yield from check_versions()
    yield from check_gpus()
    yield from check_network()
    yield from check_limits()
    yield from check_folder(folder)
    yield from check_wandb()
    yield from check_slurm()
    if "SLURM_JOB_ID" in os.environ:
        yield from check_allocation(folder)


def check_versions() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()}, tplaunch {__version__}, {sys.executable}")
    for requirement in requires("tplaunch") or []:
        name, wanted = re.match(r"([A-Za-z0-9_.-]+)(.*)", requirement.split(";")[0]).groups()  # type: ignore[union-attr]
        if "extra ==" in requirement:
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("fail", name, "is not installed", f"pip install '{name}{wanted}'")
            continue
        if _satisfies(found, wanted):
            yield Finding("ok", name, found)
        else:
            yield Finding("fail", name, f"{found}, but {wanted} is needed", f"pip install '{name}{wanted}'")


def _satisfies(found: str, wanted: str) -> bool:
    """Whether a release satisfies a list of >= and < bounds, which are all that tplaunch states."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])][:3]

    bounds = re.findall(r"(>=|<)\s*([0-9.]+)", wanted)
    return all((numbers(found) >= numbers(b)) if sign == ">=" else (numbers(found) < numbers(b)) for sign, b in bounds)


def check_gpus() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding("warn", "GPUs", f"none (no nvidia-smi): ranks run on {count_cores()} CPU cores")
        return
    fields = "--query-gpu=name,driver_version,memory.total"
    done = subprocess.run(["nvidia-smi", fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()[-1:]
        yield Finding("fail", "GPUs", f"nvidia-smi failed: {' '.join(said)}", "load or update the NVIDIA driver")
        return
    gpus = done.stdout.strip().splitlines()
    yield Finding("ok", "GPUs", f"{len(gpus)} x {gpus[0]}" if gpus else "none")
    if len(gpus) > 1:
        yield _nvlink(subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60).stdout)
    if gpus:
        yield _torch_sees(len(gpus))


def _nvlink(matrix: str) -> Finding:
    """From nvidia-smi's matrix of GPU pairs: NV18 is a pair with 18 NVLinks, PHB, SYS, ... one without."""
    rows = [line.split() for line in matrix.splitlines() if re.match(r"\s*GPU\d+\s", line) and "GPU0\tGPU1" not in line]
    pairs = [cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X"]
    without = [cell for cell in pairs if not cell.startswith("NV")]
    if not pairs or not without:
        return Finding("ok", "NVLink", f"between all GPUs ({', '.join(sorted(set(pairs)))})")
    text = f"{len(without)} of {len(pairs)} pairs of GPUs are joined by {', '.join(sorted(set(without)))} only"
    return Finding("warn", "NVLink", text, "tensor-parallel groups inside a joined pair: a smaller topology.tp")


def _torch_sees(expected: int) -> Finding:
    code = (
        "import json, torch; print(json.dumps([torch.cuda.device_count(), str(torch.version.cuda), "
        "torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        return Finding("fail", "torch", f"cannot use the GPUs: {said}", "install a torch build for this driver")
    seen, cuda, nccl = json.loads(done.stdout.splitlines()[-1])
    if seen < expected or nccl is None:
        text = f"sees {seen} of {expected} GPUs, CUDA {cuda}, NCCL {nccl}"
        return Finding("fail", "torch", text, "install a torch build with CUDA, and look at CUDA_VISIBLE_DEVICES")
    return Finding("ok", "torch", f"sees {seen} GPUs, CUDA {cuda}, NCCL {'.'.join(map(str, nccl))}")


def check_network() -> Iterator[Finding]:
    net = Path("/sys/class/net")
    up = [d.name for d in sorted(net.iterdir()) if d.name != "lo" and _read(d / "operstate") in ("up", "unknown")]
    adapters = sorted(d.name for d in Path("/sys/class/infiniband").glob("*"))
    text = f"interfaces {', '.join(up) or 'none'}; InfiniBand or RoCE: {', '.join(adapters) or 'none'}"
    yield Finding("ok", "network", text)
    host = socket.gethostname()
    fix = "for several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in launch.slurm.env"
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        yield Finding("warn", "hostname", f"{host} has no address: {error}", fix)
        return
    if ipaddress.ip_address(address).is_loopback:
        yield Finding("warn", "hostname", f"{host} is {address}: ranks on other nodes cannot reach it by that", fix)
    else:
        yield Finding("ok", "hostname", f"{host} is {address}")


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def check_limits() -> Iterator[Finding]:
    shm = shutil.disk_usage("/dev/shm").total
    if shm < SMALL_SHM:
        fix = "in a container: docker run --shm-size=8g, or --ipc=host"
        yield Finding("warn", "/dev/shm", f"{format_bytes(shm)}: NCCL may fail to start", fix)
    else:
        yield Finding("ok", "/dev/shm", format_bytes(shm))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= files < FEW_FILES:
        yield Finding("warn", "open files", f"at most {files}", f"ulimit -n {FEW_FILES}, or /etc/security/limits.conf")
    else:
        yield Finding("ok", "open files", "unlimited" if files < 0 else f"at most {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if locked >= 0 and any(Path("/sys/class/infiniband").glob("*")):
        fix = "ulimit -l unlimited; under Slurm: PropagateResourceLimitsExcept=MEMLOCK"
        yield Finding("fail", "locked memory", f"{format_bytes(locked)}: InfiniBand needs all", fix)


def check_folder(folder: Path) -> Iterator[Finding]:
    """Room, speed, locks and clock of the file system that run directories go to."""
    place = _existing(folder)
    topic = f"files in {place}"
    yield Finding("ok", topic, f"{_file_system(place)}, {format_bytes(shutil.disk_usage(place).free)} free")
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".tplaunch-doctor-") as scratch:
            yield _sync_time(Path(scratch), topic)
            yield _locks(Path(scratch), topic)
            yield _clock(Path(scratch), topic)
    except OSError as error:
        yield Finding("fail", topic, f"cannot be written: {error.strerror}", "another place: --run-dir DIR")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _file_system(path: Path) -> str:
    """The type of the file system that holds a path, such as nfs4, lustre, ext4."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(len(where), kind) for _, where, kind, *_ in mounts if path.is_relative_to(where)]
    return max(holding)[1]


def _sync_time(scratch: Path, topic: str) -> Finding:
    times = []
    for number in range(10):
        begun = time.perf_counter()
        with (scratch / str(number)).open("wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - begun)
    middle = statistics.median(times)
    text = f"a small file is durable in {middle * 1e3:.1f} ms (median of {len(times)})"
    if middle > SLOW_SYNC_S:
        return Finding("warn", topic, text, "checkpoint.async: true, or a faster file system")
    return Finding("ok", topic, text)


def _locks(scratch: Path, topic: str) -> Finding:
    with (scratch / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"cannot be locked ({error.strerror}): nothing keeps two launches out of one run directory"
            return Finding("warn", topic, text, "mount with locks (Lustre: -o flock)")
    return Finding("ok", topic, "can be locked")


def _clock(scratch: Path, topic: str) -> Finding:
    """The file server's clock against ours, by the time stamp that it gives a new file."""
    before = time.time()
    (scratch / "clock").touch()
    stamp, after = (scratch / "clock").stat().st_mtime, time.time()
    skew = max(before - stamp, stamp - after, 0.0)
    if skew > SKEW_S:
        return Finding("warn", topic, f"its clock differs from this machine's by {skew:.1f} s", "run chrony or ntpd")
    return Finding("ok", topic, "its clock is this machine's")


def check_wandb() -> Iterator[Finding]:
    from tplaunch.observe.wandb import has_credentials

    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    proxy = getproxies().get(server.scheme)
    hop = urlsplit(proxy) if proxy else server
    where = hop.hostname or "", hop.port or (80 if hop.scheme == "http" else 443)
    later = "runs are logged offline; later: wandb sync"
    try:
        socket.create_connection(where, timeout=WANDB_S).close()
    except OSError as error:
        yield Finding("warn", "W&B", f"{where[0]} cannot be reached ({error}); {later}", "a proxy: HTTPS_PROXY")
        return
    if has_credentials():
        yield Finding("ok", "W&B", f"{where[0]} can be reached, and there is a key")
    else:
        yield Finding("warn", "W&B", f"{where[0]} can be reached, but there is no key; {later}", "wandb login")


def check_slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("ok", "Slurm", "not here: tplaunch train works, submit does not")
        return
    try:
        yield Finding("ok", "Slurm", client.version())
        config = read_config(client.call("scontrol", "show", "config"))
        partitions = client.call("sinfo", "--noheader", "--format=%P|%l|%D|%G").splitlines()
        help_text = client.call("srun", "--help")
    except TplaunchError as error:
        yield Finding("fail", "Slurm", str(error.problems[0]), "see whether the controller is up: scontrol ping")
        return
    yield from judge_config(config)
    for line in partitions:
        name, limit, nodes, gres = line.split("|")
        text = f"{nodes} nodes, limit {limit}, {gres if 'gpu' in gres else 'no GPUs'}"
        yield Finding("ok", f"partition {name}", text)
    found = "--container-image" in help_text
    text = "launch.slurm.container can use pyxis" if found else "not installed: containers need runtime: apptainer"
    yield Finding("ok", "pyxis", text)


def read_config(text: str) -> dict[str, str]:
    """`scontrol show config` as a table."""
    return dict(re.findall(r"(?m)^(\w+)\s+= (.*?)\s*$", text))


def judge_config(config: dict[str, str]) -> Iterator[Finding]:
    """What the cluster's configuration means for runs that are to outlive their jobs."""
    if config.get("JobRequeue") == "1":
        yield Finding("ok", "requeue", "on")
    else:
        text = "off unless a job asks for it (tplaunch does)"
        yield Finding("warn", "requeue", text, "if Slurm refuses all the same: tplaunch submit --chain N")
    wait = int(re.findall(r"\d+", config.get("KillWait", "30"))[0])
    if wait < 30:
        text = f"{wait} s from SIGTERM to SIGKILL: scancel may come before a checkpoint"
        yield Finding("warn", "KillWait", text, "tplaunch cancel, which waits, rather than scancel")
    else:
        yield Finding("ok", "KillWait", f"{wait} s from SIGTERM to SIGKILL")
    mode = config.get("PreemptMode", "OFF")
    if mode not in ("OFF", "REQUEUE", "OFF,GANG") and "REQUEUE" not in mode:
        yield Finding(
            "warn", "preemption", f"{mode}", "jobs that are preempted save and requeue themselves if they can"
        )
    else:
        yield Finding("ok", "preemption", mode)
    if "gpu" in config.get("GresTypes", ""):
        yield Finding("ok", "GPUs of jobs", f"GresTypes={config['GresTypes']}")
    else:
        yield Finding("warn", "GPUs of jobs", "Slurm hands out none (GresTypes)", "launch.slurm.gpus: false")
    yield Finding("ok", "topology", f"{config.get('TopologyPlugin', 'none')}: ranks follow its switches")
    kept = "accounting" if config.get("AccountingStorageType", "").endswith("slurmdbd") else "no accounting"
    yield Finding(
        "ok", "finished jobs", f"{kept}; tplaunch status asks scontrol, for MinJobAge={config.get('MinJobAge')}"
    )


def check_allocation(folder: Path) -> Iterator[Finding]:
    """Each node of the job that this runs in: its own check, and its clock."""
    code = (
        "import os, pathlib, sys, time; print('clock', os.environ['SLURMD_NODENAME'], time.time()); "
        "from tplaunch.slurm.node_check import main; main(pathlib.Path(sys.argv[1]))"
    )
    try:
        lines = client.call(
            "srun", "--ntasks-per-node=1", sys.executable, "-c", code, str(_existing(folder))
        ).splitlines()
    except TplaunchError as error:
        yield Finding("fail", "nodes of this job", str(error.problems[0]))
        return
    # A site's prologue may print lines of its own, blank ones too.
    clocks = {told[1]: float(told[2]) for line in lines if (told := re.fullmatch(r"clock (\S+) (\d+\.\d+)\s*", line))}
    spread = max(clocks.values(), default=0.0) - min(clocks.values(), default=0.0)
    # Tasks do not start at one moment, so the true difference is smaller.
    if not clocks:
        fix = "see whether srun runs a command on every node: srun hostname"
        yield Finding("fail", "nodes of this job", "none has answered", fix)
    elif spread > SKEW_S:
        fix = "run chrony or ntpd on the nodes, or ask again: a slow start looks alike"
        yield Finding("warn", "clocks", f"differ by up to {spread:.1f} s between {len(clocks)} nodes", fix)
    else:
        yield Finding("ok", "clocks", f"differ by less than {spread:.1f} s between {len(clocks)} nodes")
    for report in node_reports(lines):
        if report["problems"]:
            fix = f"launch.slurm.exclude: {report['node']}, and tell the administrators"
            yield Finding("fail", f"node {report['node']}", "; ".join(report["problems"]), fix)
        else:
            yield Finding("ok", f"node {report['node']}", "fit")
