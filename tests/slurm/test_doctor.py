"""`tplaunch doctor`: what each finding says, of machines and clusters that are played."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tplaunch import doctor
from tplaunch.cli.main import run as tplaunch
from tplaunch.doctor import Finding

CONFIG = """Configuration data as of 2026-11-25T00:00:00
GresTypes               = gpu
JobRequeue              = 1
KillWait                = 30 sec
MinJobAge               = 300 sec
PreemptMode             = REQUEUE
TopologyPlugin          = topology/tree
AccountingStorageType   = accounting_storage/slurmdbd
"""
MATRIX = """\tGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\t{a}\t0-15\t0
GPU1\tNV18\t X \t{a}\t0-15\t0
GPU2\t{a}\t{a}\t X \t0-15\t0

Legend:
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    return make


def levels(findings) -> dict[str, str]:
    return {finding.topic: finding.level for finding in findings}


def test_a_good_cluster_has_nothing_to_mend() -> None:
    findings = list(doctor.judge_config(doctor.read_config(CONFIG)))
    assert {finding.level for finding in findings} == {"ok"}
    assert levels(findings).keys() >= {"requeue", "KillWait", "preemption", "GPUs of jobs", "topology", "finished jobs"}


@pytest.mark.parametrize(
    ("line", "instead", "topic", "text"),
    [
        ("JobRequeue              = 1", "JobRequeue              = 0", "requeue", "off"),
        ("KillWait                = 30", "KillWait                = 5", "KillWait", "5 s"),
        ("PreemptMode             = REQUEUE", "PreemptMode             = CANCEL", "preemption", "CANCEL"),
        ("GresTypes               = gpu", "GresTypes               = (null)", "GPUs of jobs", "none"),
    ],
)
def test_what_a_cluster_lacks_is_a_warning_with_its_mend(line: str, instead: str, topic: str, text: str) -> None:
    findings = doctor.judge_config(doctor.read_config(CONFIG.replace(line, instead)))
    (found,) = [finding for finding in findings if finding.level != "ok"]
    assert (found.level, found.topic) == ("warn", topic)
    assert text in found.text and found.fix


def test_a_cluster_is_asked_and_its_partitions_are_listed(fake) -> None:
    fake("sbatch", "echo slurm 24.05.3")
    fake("scontrol", f"cat <<'END'\n{CONFIG}\nEND")
    fake("sinfo", "printf 'gpu*|2-00:00:00|12|gpu:h100:8(S:0-1)\\ncpu|infinite|3|(null)\\n'")
    fake("srun", "echo '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'")
    findings = list(doctor.check_slurm())
    assert findings[0] == Finding("ok", "Slurm", "24.05.3")
    assert Finding("ok", "partition gpu*", "12 nodes, limit 2-00:00:00, gpu:h100:8(S:0-1)") in findings
    assert Finding("ok", "partition cpu", "3 nodes, limit infinite, no GPUs") in findings
    assert findings[-1] == Finding("ok", "pyxis", "launch.slurm.container can use pyxis")


def test_a_dead_controller_is_a_failure(fake) -> None:
    fake("sbatch", "echo slurm 24.05.3")
    fake("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    findings = list(doctor.check_slurm())
    assert findings[-1].level == "fail" and "Unable to contact" in findings[-1].text


def test_a_machine_without_slurm_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.level for finding in doctor.check_slurm()] == ["ok"]


def test_a_machine_without_gpus_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = doctor.check_gpus()
    assert finding.level == "warn" and "CPU cores" in finding.text


def test_a_broken_driver_is_a_failure(fake) -> None:
    fake("nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9")
    (finding,) = doctor.check_gpus()
    assert finding.level == "fail" and "could not communicate" in finding.text


@pytest.mark.parametrize(("link", "level"), [("NV18", "ok"), ("SYS", "warn"), ("PHB", "warn")])
def test_pairs_without_nvlink_are_found(fake, monkeypatch: pytest.MonkeyPatch, link: str, level: str) -> None:
    matrix = MATRIX.format(a=link).replace("\t", "\\t").replace("\n", "\\n")
    gpus = "NVIDIA H100 80GB HBM3, 570.1, 81559 MiB\\n" * 3
    fake("nvidia-smi", f"[[ $1 == topo ]] && printf '{matrix}' || printf '{gpus}'")
    monkeypatch.setattr(doctor, "_torch_sees", lambda expected: Finding("ok", "torch", f"{expected}"))
    findings = list(doctor.check_gpus())
    assert levels(findings) == {"GPUs": "ok", "NVLink": level, "torch": "ok"}
    assert findings[0].text.startswith("3 x NVIDIA H100")
    if level == "warn":
        assert findings[1].text == f"4 of 6 pairs of GPUs are joined by {link} only"


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.11.0", "<2.14,>=2.11", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("13.7", ">=13.7", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(found: str, wanted: str, fits: bool) -> None:
    assert doctor._satisfies(found, wanted) is fits


def test_every_requirement_is_looked_at() -> None:
    findings = list(doctor.check_versions())
    assert levels(findings).keys() >= {"python", "torch", "pydantic", "wandb", "pyyaml"}
    assert "pytest" not in levels(findings)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    findings = list(doctor.check_folder(tmp_path / "not" / "there" / "yet"))
    assert {finding.level for finding in findings} <= {"ok", "warn"}
    assert len(findings) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_failure() -> None:
    *_, last = doctor.check_folder(Path("/proc/self/runs"))
    assert last.level == "fail" and "--run-dir" in last.fix


def test_wandb_is_reached_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        (there,) = doctor.check_wandb()
    (gone,) = doctor.check_wandb()
    assert (there.level, gone.level) == ("ok", "warn")
    assert "0000" not in there.text + gone.text


def test_the_command_reports_and_exits_by_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("ok", "a", "fine"), Finding("fail", "b", "broken", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(found))
    assert tplaunch(["doctor"]) == 1
    assert capsys.readouterr().out == "ok    a: fine\nfail  b: broken\n      fix: mend it\n"
    assert tplaunch(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["fix"] == "mend it"
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(found[:1]))
    assert tplaunch(["doctor"]) == 0


def test_inside_an_allocation_each_node_is_asked(fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, bad = ({"node": n, "address": n, "problems": p} for n, p in (("n1", []), ("n2", ["GPU 3: ECC"])))
    lines = ["clock n1 1000.0", json.dumps(good), "clock n2 1003.5", json.dumps(bad)]
    fake("srun", "\n".join(f"echo '{line}'" for line in lines))
    findings = list(doctor.check_allocation(tmp_path))
    assert levels(findings) == {"clocks": "warn", "node n1": "ok", "node n2": "fail"}
    assert "3.5 s" in findings[0].text and "launch.slurm.exclude: n2" in findings[2].fix
    assert os.environ["PATH"].startswith(str(tmp_path))


def test_a_site_that_prints_lines_of_its_own_is_no_error(fake, tmp_path: Path) -> None:
    said = ["", "Welcome to the cluster", "clock", "clock is synchronised", "clock n1 1000.0", '{"node": 1']
    fake("srun", "\n".join(f"echo '{line}'" for line in said))
    assert levels(list(doctor.check_allocation(tmp_path))) == {"clocks": "ok"}
    fake("srun", "echo")
    assert levels(list(doctor.check_allocation(tmp_path))) == {"nodes of this job": "fail"}
