"""GPUs by the names that drivers give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tplaunch.spec.gpu import detect_gpu, local_gpu
from tplaunch.units import GiB


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GH200 480GB", "gh200-96gb"),  # 480 GB are the CPU's
        ("NVIDIA GH200 144G HBM3e", "gh200-144gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA H800", "h800-80gb"),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_no_gpu_is_taken_for_another(device: str, name: str | None) -> None:
    found = detect_gpu(device)
    assert (found and found.name) == name


def test_what_a_grace_hopper_holds_and_does() -> None:
    gpu = detect_gpu("NVIDIA GH200 480GB")
    assert gpu is not None and gpu.memory < 96 * GiB


def test_the_first_gpu_of_a_mixed_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "GPU 0: NVIDIA A100-SXM4-80GB (UUID: x)\nGPU 1: NVIDIA H200 (UUID: y)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = local_gpu()
    assert gpu is not None and gpu.name == "a100-80gb"
