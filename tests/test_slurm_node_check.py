"""The check of a node before the ranks start. A fake nvidia-smi plays the GPUs; their arithmetic needs real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tplaunch.launch.node_check import check_disks, check_gpu_state, check_gpus, find_slow, read_gpu_state

WELL = "0, 0, No, No, Not Active\n1, 0, No, No, Not Active\n"


def test_healthy_gpus_have_no_problems() -> None:
    assert read_gpu_state(WELL, 2) == []
    assert read_gpu_state("0, [N/A], [N/A], [N/A], [Not Supported]\n", 1) == []  # a GPU without ECC


@pytest.mark.parametrize(
    ("csv", "expected"),
    [
        ("0, 0, No, No, Not Active\n", "1 GPUs of 2"),
        (WELL.replace("1, 0,", "1, 3,"), "GPU 1: uncorrected ECC errors since the last reset (3)"),
        (WELL.replace("1, 0, No", "1, 0, Yes"), "GPU 1: memory rows wait to be remapped: reset the GPU (Yes)"),
        (WELL.replace("No, Not", "Yes, Not", 1), "GPU 0: memory rows cannot be remapped (Yes)"),
        (WELL.replace("Not Active", "Active", 1), "GPU 0: the hardware slows its clock down (heat or power) (Active)"),
        ("", "0 GPUs of 2"),
    ],
)
def test_sick_gpus_are_named(csv: str, expected: str) -> None:
    assert read_gpu_state(csv, 2) == [expected]


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_nvidia_smi_is_asked_for_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, f"echo \"$*\" >{tmp_path}/asked; printf '{WELL}'")
    assert check_gpu_state(2) == []
    fields = (tmp_path / "asked").read_text().split()[0].removeprefix("--query-gpu=").split(",")
    assert fields[0] == "index" and len(fields) == len(WELL.splitlines()[0].split(","))


def test_a_driver_that_fails_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'Unable to determine the device handle'; exit 15")
    (problem,) = check_gpus(8)
    assert "Unable to determine the device handle" in problem


def test_a_gpu_much_slower_than_its_neighbours_is_found() -> None:
    assert find_slow({0: 100.0, 1: 98.0, 2: 60.0, 3: 101.0}) == ["GPU 2: 61% of its neighbours' speed"]
    assert find_slow({0: 100.0, 1: 90.0}) == []
    assert find_slow({}) == []


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    assert check_disks([tmp_path]) == []
    assert list(tmp_path.iterdir()) == []
    (problem,) = check_disks([tmp_path / "gone"])
    assert "cannot be written: No such file" in problem


def test_a_full_disk_is_a_problem() -> None:
    (problem,) = check_disks([Path("/proc/self")])
    assert "cannot be written" in problem


def test_a_node_reports_itself_in_one_line_and_without_torch(tmp_path: Path) -> None:
    environ = {**os.environ, "SLURMD_NODENAME": "n3", "SLURM_TOPOLOGY_ADDR": "s0.s1.n3", "SLURM_GPUS_ON_NODE": "0"}
    code = (
        "import sys; from tplaunch.launch.node_check import main; from pathlib import Path; main(Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == {"node": "n3", "address": "s0.s1.n3", "problems": []}
