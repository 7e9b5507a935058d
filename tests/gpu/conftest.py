"""What all tests of the GPU share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.machine import STAND_IN, no_gpu
from tests.gpu.report import FIGURES


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and no_gpu():
        pytest.skip(f"no NVIDIA GPU is here; {STAND_IN}=1 lets the CPU stand in")


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps figures of a test for the report, where `run.py` makes one."""

    def keep(**figures: Any) -> None:
        if folder := os.environ.get(FIGURES):
            name = re.sub(r"[^\w.-]+", "-", request.node.name)
            (Path(folder) / f"{name}.json").write_text(json.dumps(figures))

    return keep
