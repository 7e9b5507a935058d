"""A run made ready inside its job, chains that Slurm refuses half-way, controllers that do not answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.slurm.test_job import Desk
from tests.slurm.test_submit import Site
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit, TplaunchError
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Submitted
from tplaunch.slurm import runs as slurm_runs
from tplaunch.slurm.nodes import node_reports
from tplaunch.slurm.runs import wait_for


def prepare(site: Site, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tplaunch.slurm.job", "prepare", "tiny.yaml", *settings],
        env={**os.environ, "SLURM_JOB_ID": "41", "SLURM_NNODES": "2"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_requeue_does_not_go_on_with_another_model(site: Site) -> None:
    done = prepare(site)
    assert done.returncode == Exit.DONE, done.stderr
    run = RunDir(site.folder / "runs/tiny")
    assert f"export RUN_DIR={run.root}\nexport WORKERS=4" in done.stdout
    (run.checkpoints / "step-00000004").mkdir()
    recipe = site.folder / "tiny.yaml"  # is edited while the job waits in the queue again
    recipe.write_text(recipe.read_text().replace("num_heads: 4,", "num_heads: 4, rope_theta: 777.0,"))
    again = prepare(site)
    assert again.returncode == Exit.USAGE
    assert "model.rope_theta: is 777.0, was 10000.0" in again.stderr
    assert load_recipe(run.recipe).recipe.model.rope_theta == 10000.0


def test_a_chain_that_slurm_refuses_half_way_is_known(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    script = (site.fake / "sbatch").read_text()
    refusal = '[[ $number == 43 ]] && { echo "QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }\necho PENDING'
    (site.fake / "sbatch").write_text(script.replace("echo PENDING", refusal))
    assert tplaunch(["submit", "tiny.yaml", "--chain", "4"]) == Exit.FAILED
    assert "QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    assert RunDir(site.folder / "runs/tiny").history().submitted_jobs == ["41", "42"]
    assert tplaunch(["cancel", "tiny"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "job 41: taken from the queue" in out and "job 42: taken from the queue" in out


def test_a_controller_that_is_away_for_a_while_ends_no_wait(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.DONE
    run = RunDir(site.folder / "runs/tiny")
    monkeypatch.setattr(slurm_runs, "POLL_S", 0.0)
    find, asked, warned = slurm_runs.client.find_jobs, [], []

    def hiccup(job_ids: Sequence[str]) -> dict[str, slurm_runs.client.Standing]:
        asked.append(job_ids)
        if len(asked) in (2, 3, 6):  # the last, where the wait is over
            raise TplaunchError("scontrol: Unable to contact slurm controller", code=Exit.FAILED)
        if len(asked) == 5:  # it answers with the job's end
            site.set_state(41, "COMPLETED")
        return find(job_ids)

    monkeypatch.setattr(slurm_runs.client, "find_jobs", hiccup)
    wait_for([run], warn=warned.append)
    assert len(asked) > 4 and len(warned) == 1 and "Unable to contact" in warned[0]
    monkeypatch.setattr(slurm_runs.client, "find_jobs", _refuse)
    with pytest.raises(TplaunchError, match="not installed"):  # a Slurm that cannot be asked at all is no hiccup
        wait_for([run])


def test_nor_ends_it_the_following_of_a_log(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.DONE
    run = RunDir(site.folder / "runs/tiny")
    monkeypatch.setattr(slurm_runs, "POLL_S", 0.0)
    log = slurm_runs.job_log(run)
    find, asked = slurm_runs.client.find_jobs, []

    def hiccup(job_ids: Sequence[str]) -> dict[str, slurm_runs.client.Standing]:
        asked.append(job_ids)
        if len(asked) in (4, 6):  # where the log is asked for, after each answer
            raise TplaunchError("scontrol: Unable to contact slurm controller", code=Exit.FAILED)
        if len(asked) == 5:
            log.write_text("the last words\n")
            site.set_state(41, "COMPLETED")
        return find(job_ids)

    monkeypatch.setattr(slurm_runs.client, "find_jobs", hiccup)
    assert tplaunch(["logs", "-f", "tiny"]) == Exit.DONE
    assert capsys.readouterr().out.endswith("the last words\n") and len(asked) == 8


def _refuse(job_ids: Sequence[str]) -> None:
    raise TplaunchError("scontrol is not installed here")


def test_garbled_lines_are_no_reports() -> None:
    report = {"node": "n1", "address": "n1", "problems": []}
    lines = ['{"node": "n2", "addr', "", "prologue of the site", "{}", "[1]", json.dumps(report)]
    assert list(node_reports(lines)) == [report]


def test_a_garbled_report_ends_no_job(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    program = desk.start("nodes", stdin='{"node": "n1", "addre\n')
    out, err = program.communicate(timeout=60)
    assert program.returncode == Exit.DONE, err
    assert out.split() == ["n1", "n2", "n3", "n4"]


def test_old_names_of_modules_still_work_in_scripts_that_wait(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run_dir.append(Submitted(["7"], [""]))
    done = subprocess.run(
        [sys.executable, "-m", "tplaunch.launch.slurm_job", "nodes", str(desk.run_dir.root)],
        env=desk.environ,
        input="",
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["n1", "n2", "n3", "n4"], done.stderr
