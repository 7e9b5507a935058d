"""The check of a node before the ranks start. A fake nvidia-smi plays the GPUs; their arithmetic needs real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tplaunch.slurm.node_check import check_disks, check_gpu_state, check_gpus, find_slow

STATE = "0, 0, Not Active\n1, 0, Not Active\n"
REMAPPED = "0000:1B:00.0, No, No\n0000:43:00.0, No, No\n"


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f'#!/bin/bash\necho "$1" >>{folder}/asked\n{script}\n')
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def answers(state: str, remapped: str) -> str:
    """The script of an nvidia-smi that gives these answers."""
    return f"case $1 in --query-gpu=*) printf '{state}' ;; *) printf '{remapped}' ;; esac"


@pytest.mark.parametrize(
    ("state", "remapped"),
    [(STATE, REMAPPED), ("0, [N/A], [Not Supported]\n1, [N/A], N/A\n", REMAPPED), (STATE, REMAPPED.replace("No", "0"))],
)
def test_healthy_gpus_have_no_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, remapped) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, answers(state, remapped))
    assert check_gpu_state(2) == []
    # Each field that is asked for has its value in the answer.
    for asked, answer in zip((tmp_path / "asked").read_text().splitlines(), (state, remapped), strict=True):
        assert asked.count(",") == answer.splitlines()[0].count(",")


@pytest.mark.parametrize(
    ("state", "remapped", "expected"),
    [
        ("0, 0, Not Active\n", "0000:1B:00.0, No, No\n", "1 GPUs of 2"),
        (STATE.replace("1, 0,", "1, 3,"), REMAPPED, "GPU 1: uncorrected ECC errors since the last reset (3)"),
        (STATE.replace("Not A", "A", 1), REMAPPED, "GPU 0: the hardware slows its clock down (heat or power) (Active)"),
        (
            STATE,
            REMAPPED.replace("No", "Yes", 1),
            "GPU 0000:1B:00.0: memory rows wait to be remapped: reset the GPU (Yes)",
        ),
        (
            STATE,
            REMAPPED.replace("No, No\n0000:43", "No, 1\n0000:43"),
            "GPU 0000:1B:00.0: memory rows cannot be remapped (1)",
        ),
    ],
)
def test_sick_gpus_are_named(tmp_path: Path, monkeypatch, state: str, remapped: str, expected: str) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, answers(state, remapped))
    assert check_gpu_state(2) == [expected]


def test_a_driver_that_lacks_a_field_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "echo 'Field \"x\" is not a valid field to query.'; exit 2"
    fake_nvidia_smi(tmp_path, monkeypatch, f"[[ $1 == --query-gpu=* ]] || {{ {refused}; }}; printf '{STATE}'")
    assert check_gpu_state(2) == []


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
        "import sys; from tplaunch.slurm.node_check import main; from pathlib import Path; main(Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == {"node": "n3", "address": "s0.s1.n3", "problems": []}
