"""The torchrun line: exact, accepted by the real torchrun, and safe to paste."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tplaunch.launch.torchrun import Rendezvous, check_loopback, shell_line, torchrun_argv, torchrun_environment
from tplaunch.machine import count_cores, count_gpus

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_one_node() -> None:
    assert torchrun_argv(Path("runs/a b"), 8) == [
        *TORCHRUN,
        *["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "8"],
        *["-m", "tplaunch.worker", "runs/a b"],
    ]


def test_many_nodes_run_the_same_line() -> None:
    rendezvous = Rendezvous(nodes=4, endpoint="n1:29400", id="7b")
    assert torchrun_argv(Path("run"), 8, rendezvous=rendezvous, max_restarts=3) == [
        *TORCHRUN,
        *["--nnodes", "4", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29400", "--rdzv-id", "7b"],
        *["--nproc-per-node", "8", "--max-restarts", "3", "-m", "tplaunch.worker", "run"],
    ]


def test_the_real_torchrun_takes_every_option() -> None:
    from torch.distributed.run import parse_args

    rendezvous = Rendezvous(nodes=4, endpoint="n1:29400", id="7b")
    for given in (None, rendezvous):
        known = parse_args(torchrun_argv(Path("run"), 2, rendezvous=given, max_restarts=1)[3:])
        assert (known.module, known.training_script, known.training_script_args) == (True, "tplaunch.worker", ["run"])
        assert (known.nproc_per_node, known.max_restarts, known.standalone) == ("2", 1, given is None)


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(ranks: int) -> str:
        return torchrun_environment(ranks, attempt=1, resume="auto", grace_s=1, one_node=True)["OMP_NUM_THREADS"]

    assert threads(1) == str(count_cores())
    assert threads(10**6) == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(1) == "3"


def test_threads_do_not_spin_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def environment() -> dict[str, str]:
        return torchrun_environment(1, attempt=1, resume="auto", grace_s=1, one_node=True)

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert environment()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # which a count of spins would override
    assert "GOMP_SPINCOUNT" not in environment()


def test_the_allocator_is_the_users_where_he_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocator() -> str | None:
        return torchrun_environment(1, attempt=1, resume="auto", grace_s=1, one_node=True).get("PYTORCH_ALLOC_CONF")

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert allocator() == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    assert allocator() == "backend:cudaMallocAsync"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")  # the older name
    assert allocator() is None


def test_environment() -> None:
    one = torchrun_environment(2, attempt=4, resume="none", grace_s=90.5, one_node=True)
    assert one["TPLAUNCH_ATTEMPT"] == "4" and one["TPLAUNCH_RESUME"] == "none"
    assert one["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "91"
    assert one["GLOO_SOCKET_IFNAME"] == "lo"
    shares = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    again = torchrun_environment(2, attempt=4, resume="none", grace_s=1, one_node=True, max_restarts=1)
    assert shares not in one and again[shares] == "1"
    assert "GLOO_SOCKET_IFNAME" not in torchrun_environment(2, attempt=4, resume="none", grace_s=1, one_node=False)


def test_the_line_survives_a_shell() -> None:
    argv = [sys.executable, "-c", "import os, sys; print([sys.argv[1], os.environ['A']])", "it's $HOME; a b"]
    line = shell_line(argv, {"A": "x 'y' $z"})
    out = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert out == str(["it's $HOME; a b", "x 'y' $z"]) + "\n"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("0,1", 2), ("2,-1,3", 1), ("GPU-5a,GPU-7b", 2)]
)
def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus(tmp_path) == count


def test_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert count_gpus(tmp_path) == 0


def test_no_torch() -> None:
    code = "import sys, tplaunch.launch.local, tplaunch.launch.torchrun; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True).stdout == "False\n"
    )


def unshared() -> bool:
    """Whether this machine lets a user make a network namespace; in a new one, `lo` is down."""
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not unshared(), reason="needs user and network namespaces")
@pytest.mark.parametrize("command", ["train", "bench"])
def test_no_loopback_is_said_before_anything_starts(tmp_path: Path, command: str) -> None:
    line = ["unshare", "-rn", sys.executable, "-m", "tplaunch", command, "quickstart"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "127.0.0.1, and it does not answer: Network is unreachable" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_loopback_answers_here() -> None:
    check_loopback()
