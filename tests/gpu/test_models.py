"""What else trains and writes on CUDA: the same as on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_experts import SPARSE, train_on
from tests.gpu.test_launch import train
from tests.recipes import case
from tests.train.test_lora_invariance import lora
from tests.train.test_muon import LATENT
from tests.train.test_torchrun import environment, shape
from tests.world import World
from tplaunch.errors import Exit

pytestmark = pytest.mark.gpu
MUON = {"name": "muon", "lr": 3e-3}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "latent": (case(model=LATENT), 1e-4),
    "muon": (case(optimizer=MUON), 1e-3),  # Newton-Schulz amplifies rounding
    "muon, latent, experts": (case(model={**LATENT, "moe": SPARSE}, optimizer=MUON), 1e-3),
    "adapters": (lora(case(optimizer={"lr": 5e-3})), 1e-4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_run_is_that_of_the_cpu(world: World, note: Callable[..., None], name: str) -> None:
    raw, tolerance = CASES[name]
    (here,), (there,) = (world.run(1, train_on, raw, device) for device in ("cpu", "gpu"))
    pairs = [pair for step in zip(here, there, strict=True) for pair in zip(*step, strict=True)]
    worst = max(abs(a / b - 1) for a, b in pairs)
    note(worst=worst)
    assert worst <= tolerance


def test_texts_are_those_of_the_cpu(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    code, said = train(tmp_path / "run", cache, [*shape(1, 1, 1), "training.precision=fp32"])
    assert code == Exit.DONE, said
    prompts = [word for text in ("O, what", "Come", "I am no") for word in ("-p", text)]
    line = [
        sys.executable,
        "-m",
        "tplaunch",
        "generate",
        str(tmp_path / "run"),
        *prompts,
        "--max-tokens",
        "24",
        "--json",
    ]
    texts = []
    for variables in ({"CUDA_VISIBLE_DEVICES": ""}, {}):
        done = subprocess.run(
            line, env={**environment(cache), **variables}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == Exit.DONE, done.stderr
        texts.append([json.loads(one)["text"] for one in done.stdout.splitlines() if one.startswith("{")])
    assert texts[0] == texts[1] and any(texts[0])
