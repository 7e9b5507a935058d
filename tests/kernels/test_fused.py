"""Fused element-wise kernels, by Triton's interpreter where Triton is installed (torch's CPU builds come without)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import CASES, difference

RUN = """
import torch
from tests.kernels.cases import CASES, difference
from tplaunch.kernels import fused
fused.fits = lambda x: x.dtype != torch.float64
for name, case in CASES.items():
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        found = max(difference(case, torch.device("cpu"), dtype))
        assert found < limit, (name, dtype, found)
print("all", len(CASES))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_right() -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["all", str(len(CASES))]


@pytest.mark.parametrize("name", CASES)
def test_torchs_operations_are_right(name: str) -> None:
    assert max(difference(CASES[name], torch.device("cpu"), torch.float32)) < 1e-6
