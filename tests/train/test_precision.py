"""bf16 against fp32, fp16, and compiled against eager, on the quickstart's text."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.train.test_torchrun import command, curve, environment, shape

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 200


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def losses(run_dir: Path, cache: Path, *settings: str) -> list[float]:
    length = [f"training.steps={STEPS}", "training.seq_len=32", "checkpoint.every=0"]
    settings = (*shape(2, 1, 1), *length, "optimizer.lr=1e-3", *settings)
    env = {**environment(cache), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    done = subprocess.run(command(run_dir, *settings), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [loss for _, loss, _ in curve(run_dir)]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[float]:
    return losses(tmp_path_factory.mktemp("fp32") / "run", cache, "training.precision=fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(tmp_path: Path, cache: Path, fp32: list[float], precision: str) -> None:
    half = losses(tmp_path / "run", cache, f"training.precision={precision}")
    assert len(half) == STEPS and fp32[-1] < 0.85 * fp32[0]
    for step in range(STEPS):
        assert half[step] == pytest.approx(fp32[step], rel=0.02), f"step {step + 1}"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_compiled_follows_eager(
    tmp_path: Path, cache: Path, fp32: list[float], precision: str, tolerance: float
) -> None:
    compiled = losses(tmp_path / "run", cache, f"training.precision={precision}", "training.compile=true")
    for step in range(STEPS):
        assert compiled[step] == pytest.approx(fp32[step], rel=tolerance), f"step {step + 1}"
