"""The real thing on a GPU: `tplaunch train`, over NCCL with one rank, over gloo with two."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.machine import on_cpu
from tests.train.test_torchrun import command, curve, environment, shape
from tplaunch.errors import Exit
from tplaunch.machine import SHARE_GPUS
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Profiled

pytestmark = pytest.mark.gpu
STEPS = 8
TINY = [f"training.steps={STEPS}", "training.seq_len=32", "training.micro_batch_size=2", "training.global_batch_size=4"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def train(root: Path, cache: Path, settings: list[str], **variables: str) -> tuple[int, str]:
    """Train a tiny recipe; the exit code and what was said."""
    gpu = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu() else {}
    done = subprocess.run(
        command(root, *TINY, *settings),
        env={**environment(cache), **gpu, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_one_rank_over_nccl_and_two_on_a_gpu_follow_the_cpu(
    tmp_path: Path, cache: Path, note: Callable[..., None]
) -> None:
    runs = {
        "cpu": (shape(1, 1, 1), {"CUDA_VISIBLE_DEVICES": ""}),
        "one": (shape(1, 1, 1), {}),
        "two": (shape(2, 1, 1), {SHARE_GPUS: "1"}),
    }
    for name, (settings, variables) in runs.items():
        code, said = train(tmp_path / name, cache, settings, **variables)
        assert code == Exit.DONE, said
    cpu, one, two = (curve(tmp_path / name) for name in runs)
    worst = {
        name: max(
            abs(a / b - 1) for ours, theirs in zip(found, cpu, strict=True) for a, b in zip(ours, theirs, strict=True)
        )
        for name, found in (("one", one), ("two", two))
    }
    note(**worst)
    assert len(cpu) == STEPS
    assert max(worst.values()) < 1e-4


def test_a_profile_holds_kernels_and_memory(tmp_path: Path, cache: Path) -> None:
    code, said = train(tmp_path, cache, [*shape(1, 1, 1), "logging.profile.steps=[3,4]"])
    assert code == Exit.DONE, said
    (event,) = [event for event in RunDir(tmp_path).history().events if isinstance(event, Profiled)]
    trace = json.loads(gzip.decompress(Path(event.trace).read_bytes()))
    kinds = {entry.get("cat") for entry in trace["traceEvents"]}
    assert "cpu_op" in kinds and ("kernel" in kinds) != on_cpu()
    assert (event.memory is None) == on_cpu()
    if event.memory is not None:
        snapshot = pickle.loads(Path(event.memory).read_bytes())
        actions = [entry for device in snapshot["device_traces"] for entry in device]
        assert {"alloc", "free_completed"} <= {entry["action"] for entry in actions}
        assert any("tplaunch" in frame["filename"] for entry in actions for frame in entry["frames"])


def test_an_error_leaves_the_collectives_before_it(tmp_path: Path, cache: Path) -> None:
    settings = [*shape(1, 1, 1), "launch.max_restarts=0"]
    code, said = train(tmp_path, cache, settings, TPLAUNCH_FAULT="rank=0,step=3,kind=exception")
    assert code == Exit.FAILED, said
    entries = json.loads(RunDir(tmp_path).rank_flight(1, 0).read_text())["entries"]
    names = [entry["profiling_name"] for entry in entries]  # one rank has nothing to exchange over NCCL
    assert any(name.startswith(("gloo:", "nccl:")) for name in names), names


def test_a_hang_leaves_the_collectives_before_it(tmp_path: Path, cache: Path) -> None:
    """Of two ranks on one GPU, one hangs: the other waits over gloo, in vain."""
    settings = [*shape(2, 1, 1), "launch.max_restarts=0", "launch.timeout=15"]
    variables = {SHARE_GPUS: "1", "TPLAUNCH_FAULT": "rank=1,step=5,kind=hang"}
    code, said = train(tmp_path, cache, settings, **variables)
    assert code == Exit.FAILED, said
    assert "Rank 1 failed" in said and "did not arrive" in said
    entries = json.loads(RunDir(tmp_path).rank_flight(1, 0).read_text())["entries"]
    assert entries[-1]["profiling_name"].startswith("gloo:")
