"""Where the engines are, and how they are asked."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest

HERE = Path(__file__).resolve().parent
VARIABLE = "TPLAUNCH_ENGINES"


def python_of(environment: str) -> Path:
    """The interpreter of an environment of `tests/engines/setup`; skips where there is none."""
    folder = os.environ.get(VARIABLE)
    if folder is None or not (python := Path(folder, environment, "bin", "python")).exists():
        pytest.skip(f"needs its environments: tests/engines/setup DIR && {VARIABLE}=DIR pytest -m engines")
    return python


def ask(script: str, request: dict[str, Any], of: Literal["vllm", "bridge"] = "vllm") -> Any:
    """What a script of this folder answers in an environment of `tests/engines/setup`."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [python_of(of), HERE / script],
        input=json.dumps(request),
        env={**inherited, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return json.loads(answer.removeprefix("ANSWER "))
