"""GPUs, as far as planning and MFU need them: peaks, memory, links, and what share of a peak real kernels reach.

Peaks are dense (no sparsity), from the vendors' data sheets: NVIDIA A100 (2021), H100 and H200, HGX B200,
GB200 NVL72; AMD MI300X. `memory` is what the driver shows, below the figure on the box. Link bandwidths are one way,
for one GPU. `matmul_efficiency` and `attention_efficiency` are what training steps reach, not single kernels: for
A100 and H100 chosen to fit 23 measured FSDP runs (MosaicML, llm-foundry scripts/train/benchmarking, 2023; no other
figure is fitted). That is 0.86 and 0.75 of the best matmul measured on them (S. Bekman, "Maximum Achievable Matmul
FLOPS", ml-engineering); GPUs without such runs get 0.75 of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tplaunch.errors import Problem, TplaunchError
from tplaunch.units import GiB


@dataclass(frozen=True)
class Gpu:
    """One GPU with its place in a node and in the network.

    Args:
        name: key of the table, such as "h100-80gb".
        peak: dense FLOP/s by precision ("fp64", "fp32", "bf16", "fp16"). fp32 is what torch's default gives: no TF32.
        memory: bytes that the driver shows.
        memory_bandwidth: bytes/s.
        node_size: GPUs joined by the fast link.
        link_bandwidth: bytes/s one way from one GPU to others of its node.
        network_bandwidth: bytes/s one way from one GPU to other nodes (its share of the node's adapters).
        power: watts at full load; 0: not known.
        matmul_efficiency, attention_efficiency, link_efficiency, memory_efficiency: shares of the peaks that kernels
            reach on large inputs.
        link_latency, network_latency: seconds that each hop of a collective costs whatever its size.
        kernel_latency: seconds that launching one kernel costs at least.
    """

    name: str
    peak: Mapping[str, float]
    memory: int
    memory_bandwidth: float
    node_size: int
    link_bandwidth: float
    network_bandwidth: float
    power: float
    matmul_efficiency: float
    attention_efficiency: float
    link_efficiency: float = 0.8
    memory_efficiency: float = 0.85
    link_latency: float = 2e-6
    network_latency: float = 10e-6
    kernel_latency: float = 4e-6


def _peaks(*, fp64: float, fp32: float, half: float) -> dict[str, float]:
    return {"fp64": fp64 * 1e12, "fp32": fp32 * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}


_A100_PEAKS = _peaks(fp64=19.5, fp32=19.5, half=312)
_HOPPER_PEAKS = _peaks(fp64=67, fp32=67, half=989.4)

_TABLE = [
    Gpu(
        name="a100-40gb",
        peak=_A100_PEAKS,
        memory=int(39.4 * GiB),
        memory_bandwidth=1.555e12,
        node_size=8,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        power=400,
        matmul_efficiency=0.75,
        attention_efficiency=0.35,
    ),
    Gpu(
        name="a100-80gb",
        peak=_A100_PEAKS,
        memory=int(79.15 * GiB),
        memory_bandwidth=2.039e12,
        node_size=8,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        power=400,
        matmul_efficiency=0.75,
        attention_efficiency=0.35,
    ),
    Gpu(
        name="h100-80gb",
        peak=_HOPPER_PEAKS,
        memory=int(79.1 * GiB),
        memory_bandwidth=3.35e12,
        node_size=8,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        power=700,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="h200",
        peak=_HOPPER_PEAKS,
        memory=int(139.8 * GiB),
        memory_bandwidth=4.8e12,
        node_size=8,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        power=700,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="h800-80gb",  # an H100 with less fp64 and NVLink (DeepSeek-AI 2025, arXiv 2505.09343, section 2.1)
        peak=_peaks(fp64=1, fp32=67, half=989.4),
        memory=int(79.1 * GiB),
        memory_bandwidth=3.35e12,
        node_size=8,
        link_bandwidth=200e9,
        network_bandwidth=50e9,
        power=700,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    # PCIe cards and single-chip modules: peaks from their data sheets, efficiencies of the SXM modules, unmeasured.
    Gpu(
        name="a100-pcie-40gb",
        peak=_A100_PEAKS,
        memory=int(39.4 * GiB),
        memory_bandwidth=1.555e12,
        node_size=8,
        link_bandwidth=32e9,
        network_bandwidth=25e9,
        power=250,
        matmul_efficiency=0.75,
        attention_efficiency=0.35,
    ),
    Gpu(
        name="a100-pcie-80gb",
        peak=_A100_PEAKS,
        memory=int(79.15 * GiB),
        memory_bandwidth=1.935e12,
        node_size=8,
        link_bandwidth=32e9,
        network_bandwidth=25e9,
        power=300,
        matmul_efficiency=0.75,
        attention_efficiency=0.35,
    ),
    Gpu(
        name="h100-pcie",
        peak=_peaks(fp64=51, fp32=51, half=756),
        memory=int(79.1 * GiB),
        memory_bandwidth=2.0e12,
        node_size=8,
        link_bandwidth=64e9,
        network_bandwidth=50e9,
        power=350,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="h100-nvl",
        peak=_peaks(fp64=60, fp32=60, half=835),
        memory=int(93.1 * GiB),
        memory_bandwidth=3.9e12,
        node_size=2,
        link_bandwidth=300e9,
        network_bandwidth=50e9,
        power=400,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="h200-nvl",
        peak=_peaks(fp64=60, fp32=60, half=835),
        memory=int(139.8 * GiB),
        memory_bandwidth=4.8e12,
        node_size=4,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        power=600,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="h20",
        peak=_peaks(fp64=1, fp32=44, half=148),
        memory=int(95.0 * GiB),
        memory_bandwidth=4.0e12,
        node_size=8,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        power=400,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="gh200-96gb",
        peak=_HOPPER_PEAKS,
        memory=int(94.5 * GiB),
        memory_bandwidth=4.0e12,
        node_size=4,
        link_bandwidth=150e9,
        network_bandwidth=25e9,
        power=700,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="gh200-144gb",
        peak=_HOPPER_PEAKS,
        memory=int(141.0 * GiB),
        memory_bandwidth=4.9e12,
        node_size=4,
        link_bandwidth=150e9,
        network_bandwidth=25e9,
        power=700,
        matmul_efficiency=0.60,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="b200",
        peak=_peaks(fp64=40, fp32=80, half=2250),
        memory=int(178.3 * GiB),
        memory_bandwidth=8.0e12,
        node_size=8,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        power=1000,
        matmul_efficiency=0.58,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="gb200",
        peak=_peaks(fp64=40, fp32=80, half=2500),
        memory=int(184.3 * GiB),
        memory_bandwidth=8.0e12,
        node_size=72,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        power=1200,
        matmul_efficiency=0.55,
        attention_efficiency=0.25,
    ),
    Gpu(
        name="mi300x",
        peak=_peaks(fp64=163.4, fp32=163.4, half=1307.4),
        memory=int(191.9 * GiB),
        memory_bandwidth=5.3e12,
        node_size=8,
        link_bandwidth=448e9,
        network_bandwidth=50e9,
        power=750,
        matmul_efficiency=0.39,
        attention_efficiency=0.20,
    ),
]

GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}

# What a device's own name (torch.cuda.get_device_name, nvidia-smi -L) holds: the first that fits.
_DEVICE_NAMES = [
    (r"\bGB200\b", "gb200"),
    (r"\bGH200 144", "gh200-144gb"),
    (r"\bGH200\b", "gh200-96gb"),
    (r"\bB200\b", "b200"),
    (r"\bH200 NVL\b", "h200-nvl"),
    (r"\bH200\b", "h200"),
    (r"\bH100 NVL\b", "h100-nvl"),
    (r"\bH100 PCIe\b", "h100-pcie"),
    (r"\bH100 80GB HBM3\b", "h100-80gb"),
    (r"\bH800\b(?! PCIe| NVL)", "h800-80gb"),
    (r"\bH20\b", "h20"),
    (r"\bA100-SXM4-80GB\b", "a100-80gb"),
    (r"\bA100-SXM4-40GB\b", "a100-40gb"),
    (r"\bA100 80GB PCIe\b", "a100-pcie-80gb"),
    (r"\bA100-PCIE-40GB\b", "a100-pcie-40gb"),
    (r"\bMI300X\b", "mi300x"),
]


def detect_gpu(device_name: str) -> Gpu | None:
    """The table's entry for a device by the name that its driver gives, or None."""
    return next((GPUS[name] for pattern, name in _DEVICE_NAMES if re.search(pattern, device_name)), None)


def local_gpu() -> Gpu | None:
    """The first of this machine's GPUs, as nvidia-smi or rocm-smi lists them, that the table has."""
    import shutil
    import subprocess

    for tool, *arguments in (("nvidia-smi", "-L"), ("rocm-smi", "--showproductname")):
        program = shutil.which(tool)
        if program is None:
            continue
        try:
            listing = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue  # a driver that does not answer names no GPU
        named = (detect_gpu(line) for line in listing.splitlines())
        if found := next(filter(None, named), None):
            return found
    return None


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in the table, or from a calibration file (JSON, the fields of `Gpu`).

    Raises:
        TplaunchError: no such GPU, or the file does not describe one.
    """
    if name.endswith(".json"):
        return _read_gpu(Path(name))
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    known = ", ".join(GPUS)
    raise TplaunchError(
        Problem(
            f"no GPU is called {name!r}",
            fix=f"use one of {known}, or a .json file with the fields of one",
            key="hardware.gpu",
        )
    )


def _read_gpu(path: Path) -> Gpu:
    import json

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        gpu = Gpu(**values)
        others = ("name", "peak", *(["power"] if gpu.power == 0 else []))
        numbers = {**{f.name: getattr(gpu, f.name) for f in fields(Gpu) if f.name not in others}, **gpu.peak}
        bad = [key for key, value in numbers.items() if isinstance(value, bool) or not 0 < value < float("inf")]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TplaunchError(Problem("not a GPU description", why=str(error), where=str(path))) from error
    if bad:
        raise TplaunchError(Problem(f"must be positive numbers: {', '.join(bad)}", where=str(path)))
    return gpu


def write_gpu(gpu: Gpu, path: Path) -> None:
    """Write a GPU description that `find_gpu` reads."""
    import json

    path.write_text(json.dumps(asdict(gpu), indent=2) + "\n", encoding="utf-8")
