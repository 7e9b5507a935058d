"""`tplaunch bench --calibrate` on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.machine import on_cpu
from tests.train.test_torchrun import environment, shape
from tplaunch.spec.gpu import find_gpu

pytestmark = pytest.mark.gpu


def test_bench_measures_the_machine(tmp_path: Path, note: Callable[..., None]) -> None:
    machine = tmp_path / "machine.json"
    words = [sys.executable, "-m", "tplaunch", "bench", "quickstart", "--json", "--steps", "3"]
    words += ["--calibrate", str(machine)]
    words += [word for one in shape(1, 1, 1) for word in ("--set", one)]
    gpu = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu() else {}
    done = subprocess.run(words, env={**environment(tmp_path), **gpu}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found, gpu_found = json.loads(done.stdout), find_gpu(str(machine))
    note(
        name=gpu_found.name,
        matmul_efficiency=gpu_found.matmul_efficiency,
        attention_efficiency=gpu_found.attention_efficiency,
        memory_efficiency=gpu_found.memory_efficiency,
        kernel_latency_us=gpu_found.kernel_latency * 1e6,
        step_s=min(found["seconds"]),
        **{f"{kind}_s": seconds for kind, seconds in found["kernels"].items()},
    )
    assert len(found["seconds"]) == 3
    if not on_cpu():
        assert gpu_found.name != "measured", "the table of GPUs does not know this one"
        assert 0.3 < gpu_found.matmul_efficiency < 1.05
        assert 0.5 < gpu_found.memory_efficiency < 1.05
        assert set(found["kernels"]) >= {"matmul", "attention", "other kernels"}
