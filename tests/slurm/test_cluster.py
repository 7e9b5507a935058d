"""Whole runs on a real Slurm, which `slurm/dev-cluster` starts on this machine (see there for the packages).

Jobs are interrupted at a known step: the test waits for it, and holds the ranks (SIGSTOP) while it acts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.test_units import SLURM_SIZES, SLURM_TIMES
from tplaunch.errors import Exit, TplaunchError
from tplaunch.files import append_line, read_lines
from tplaunch.run.directory import RunDir
from tplaunch.slurm import client as slurm

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
DEV_CLUSTER = ROOT / "slurm" / "dev-cluster"
PATIENCE = 240.0  # seconds; machines that run tests are slow at times
STEPS = 12
RECIPE = {
    "name": "tiny",
    "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 64,
              "vocab_size": 512},
    "topology": {"tp": 1, "pp": 2, "dp": 1, "nodes": 2},
    "training": {"seq_len": 32, "micro_batch_size": 1, "global_batch_size": 8, "steps": STEPS, "precision": "fp32"},
    "optimizer": {"lr": 1e-3},
    "data": {"train": str(ROOT / "recipes/data/shakespeare-validation.txt"), "tokenizer": {"vocab_size": 512}},
    "checkpoint": {"every": 2},
    "logging": {"every": 1, "wandb": {"mode": "offline"}},
    "launch": {"slurm": {"gpus": False, "grace": "10s"}},
}  # fmt: skip
ONE_RANK = ["--set", "topology.pp=1", "--set", "topology.nodes=1"]  # starts soonest
EIGHT_RANKS = ["--set", "topology.tp=2", "--set", "topology.dp=2", "--set", "training.steps=5"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    was_up = subprocess.run([DEV_CLUSTER, "status"], capture_output=True).returncode == 0
    done = subprocess.run([DEV_CLUSTER, "up", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    os.environ["SLURM_CONF"] = done.stdout.strip().removeprefix("export SLURM_CONF=")
    yield
    if not was_up:
        subprocess.run([DEV_CLUSTER, "down"], capture_output=True, check=True)


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    yield
    slurm.call("scancel", "--user=root")
    wait_until("the queue is empty", lambda: not slurm.call("squeue", "--noheader").strip())


def wait_until(what: str, condition: Callable[[], object], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}"
        time.sleep(0.2)


class Site:
    """A working folder with the recipe, and the program."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.run_dir = RunDir(folder / "runs" / "tiny")
        self.environ = {**os.environ, "TPLAUNCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))

    def tplaunch(self, *argv: str, code: int = Exit.DONE) -> str:
        """Runs a command to its end and returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-c", "from tplaunch.cli.main import main; main()", *argv],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout + (done.stderr if code else "")

    def submit(self, *argv: str) -> str:
        """Submits the recipe and returns the job's number."""
        output = self.tplaunch("submit", "tiny.yaml", *argv)
        return output.split()[1]

    def status(self, *runs: str) -> list[dict]:
        return json.loads(self.tplaunch("status", "--json", *runs))

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("**/slurm/*.log"))

    def step(self) -> int:
        return max((record["step"] for record in self.run_dir.read_metrics()), default=0)

    def wait_for_step(self, step: int) -> None:
        wait_until(f"step {step}", lambda: self.step() >= step)

    def wait_for_state(self, job: str, *states: str) -> slurm.Job:
        found: list[slurm.Job | None] = []

        def there() -> bool:
            found[:] = [slurm.find_job(job)]
            assert found[0] is not None
            # Not one that will never get there.
            assert found[0].open or found[0].state in states, f"{found[0]}\n{self.log()}"
            return found[0].state in states

        wait_until(f"job {job} {' or '.join(states)}", there)
        assert found[0] is not None
        return found[0]

    def attempts(self) -> list[dict]:
        return [event for event in read_lines(self.run_dir.events) if event["event"] == "attempt"]

    def ranks(self) -> list[int]:
        """The processes of this run that are ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:  # ended meanwhile
                    continue
                if os.fsencode(self.run_dir.root) in words and words[2:4] == [b"-m", b"tplaunch.worker"]:
                    found.append(int(entry.name))
        return sorted(found)

    def signal_ranks(self, number: signal.Signals) -> None:
        for pid in self.ranks():
            os.kill(pid, number)

    def hold_at(self, step: int) -> None:
        """Waits for a step and then stops the ranks' clocks, so that the run cannot end before the test has acted."""
        self.wait_for_step(step)
        self.signal_ranks(signal.SIGSTOP)
        assert self.step() < STEPS, "the run was too fast to be held"

    def release_told(self) -> None:
        """Lets held ranks go on once each of them has been told to stop: the signal waits for them, as for any
        process that is stopped."""
        wait_until("the signal to every rank", lambda: all(has_pending(pid, signal.SIGUSR1) for pid in self.ranks()))
        self.signal_ranks(signal.SIGCONT)


def has_pending(pid: int, number: signal.Signals) -> bool:
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool((int(status["ShdPnd"], 16) | int(status["SigPnd"], 16)) >> (number - 1) & 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def site(tmp_path: Path, cache: Path) -> Site:
    return Site(tmp_path, cache)


def curve(run_dir: RunDir) -> list[tuple]:
    """What must not depend on interruptions, of every step."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in run_dir.read_metrics()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[tuple]:
    """The same run, on this machine without Slurm and in one piece."""
    site = Site(tmp_path_factory.mktemp("local"), cache)
    site.tplaunch("train", "tiny.yaml", "--set", "topology.nodes=1")
    assert [step for step, *_ in curve(site.run_dir)] == list(range(1, STEPS + 1))
    return curve(site.run_dir)


def check_joined(site: Site, uninterrupted: list[tuple], job: str) -> None:
    """One run directory, no step twice, the curve of one piece bit for bit, one W&B run."""
    site.wait_for_state(job, "COMPLETED")
    assert curve(site.run_dir) == uninterrupted
    ids = {path.name.rsplit("-", 1)[1] for path in site.run_dir.wandb.glob("wandb/offline-run-*")}
    ids |= {path.name.rsplit("-", 1)[1] for path in site.run_dir.wandb.glob("offline-run-*")}
    assert len(ids) == 1


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[tuple]:
    """TP2 x PP2 x DP2 on this machine without Slurm."""
    site = Site(tmp_path_factory.mktemp("eight"), cache)
    site.tplaunch("train", "tiny.yaml", *EIGHT_RANKS, "--set", "topology.nodes=1")
    return curve(site.run_dir)


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_submitted_run_equals_the_local_one(site: Site, eight_ranks: list[tuple], nodes: int) -> None:
    output = site.tplaunch("submit", "tiny.yaml", *EIGHT_RANKS, "--set", f"topology.nodes={nodes}", "--wait")
    assert f"log    {site.run_dir.slurm}" in output
    assert len(curve(site.run_dir)) == 5
    for ours, theirs in zip(curve(site.run_dir), eight_ranks, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # dev-cluster's switches hold the odd and the even nodes: ranks follow them.
    assert site.attempts()[0]["nodes"] == (["n1", "n3", "n2", "n4"] if nodes == 4 else ["n1", "n3"])


def test_the_time_limit(site: Site, uninterrupted: list[tuple]) -> None:
    job = site.submit("--set", "launch.slurm.time=1m")
    site.hold_at(3)
    site.release_told()
    check_joined(site, uninterrupted, job)
    assert len(site.attempts()) >= 2
    assert "stopped with a checkpoint: the time limit is near" in site.log()
    assert slurm.find_job(job).restarts >= 1


def test_a_requeue_from_outside(site: Site, uninterrupted: list[tuple]) -> None:
    job = site.submit()
    site.hold_at(3)
    slurm.call("scontrol", "requeue", job)
    wait_until("the wait", lambda: site.status()[0]["state"] == "requeued")
    check_joined(site, uninterrupted, job)
    assert len(site.attempts()) == 2


def test_preemption(site: Site, uninterrupted: list[tuple]) -> None:
    job = site.submit()
    site.hold_at(3)
    rival = slurm.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    check_joined(site, uninterrupted, job)
    assert slurm.find_job(rival).state == "COMPLETED"
    assert "stopped with a checkpoint: preempted" in site.log()
    assert len(site.attempts()) == 2


def test_a_lost_node(site: Site, uninterrupted: list[tuple]) -> None:
    job = site.submit()
    site.hold_at(5)
    before = site.attempts()[0]["nodes"]
    try:
        subprocess.run([DEV_CLUSTER, "kill-node", before[1]], check=True, capture_output=True)
        check_joined(site, uninterrupted, job)
    finally:
        subprocess.run([DEV_CLUSTER, "start-node", before[1]], check=True, capture_output=True)
    assert before[1] not in site.attempts()[1]["nodes"]
    assert len(site.attempts()) == 2


def test_a_killed_rank_is_started_again_in_the_same_job(site: Site, uninterrupted: list[tuple]) -> None:
    job = site.submit("--set", "launch.max_restarts=1")
    site.hold_at(5)
    os.kill(site.ranks()[-1], signal.SIGKILL)
    site.signal_ranks(signal.SIGCONT)
    check_joined(site, uninterrupted, job)
    assert slurm.find_job(job).restarts == 0
    assert [attempt["job"] for attempt in site.attempts()] == [job, job]
    assert "killed by SIGKILL" in site.log()


def test_scancel_stops_clean_and_for_good(site: Site, uninterrupted: list[tuple]) -> None:
    job = site.submit()
    site.hold_at(3)
    slurm.call("scancel", job)
    ended = site.wait_for_state(job, "CANCELLED")
    assert (ended.exit_code, ended.restarts) == (Exit.STOPPED, 0)
    (end,) = [event for event in read_lines(site.run_dir.events) if event["event"] == "stopped"]
    assert end["step"] == site.step() < STEPS
    # Submitted again, it goes on.
    check_joined(site, uninterrupted, site.submit())


def test_cancel_asks_a_run_to_stop_and_ends_its_chain(site: Site, uninterrupted: list[tuple]) -> None:
    first = site.submit("--chain", "3")
    jobs = [str(int(first) + k) for k in range(3)]
    site.hold_at(3)
    assert [row["state"] for row in site.status()] == ["running"]
    output = site.tplaunch("cancel", "tiny")
    assert f"job {jobs[1]}: taken from the queue" in output
    assert f"job {first}: asked to finish its step, save and stop" in output
    site.release_told()
    assert site.wait_for_state(first, "FAILED").exit_code == Exit.STOPPED
    assert site.status()[0]["state"] == "stopped"
    assert {slurm.find_job(job).state for job in jobs[1:] if slurm.find_job(job)} <= {"CANCELLED"}
    assert len(site.attempts()) == 1


def test_a_chain_goes_on_without_requeue_and_cancels_its_rest(site: Site, uninterrupted: list[tuple]) -> None:
    first = site.submit("--chain", "3")
    jobs = [str(int(first) + k) for k in range(3)]
    site.hold_at(3)
    slurm.call("scancel", "--batch", "--signal=USR1", first)
    site.release_told()
    check_joined(site, uninterrupted, jobs[1])
    assert slurm.find_job(first).exit_code == Exit.STOPPED
    wait_until("the end of the rest", lambda: (last := slurm.find_job(jobs[2])) is None or last.state == "CANCELLED")
    assert [attempt["job"] for attempt in site.attempts()] == jobs[:2]
    assert site.status()[0]["state"] == "done"


@pytest.mark.parametrize("options", [[], ["--batch"]], ids=["ranks", "batch"])
def test_a_profile_is_asked_for_by_a_signal(site: Site, options: list[str]) -> None:
    """Slurm gives it to torchrun and to every rank, or to the batch script, which hands it on; the job goes on."""
    job = site.submit()
    site.hold_at(3)
    slurm.call("scancel", *options, "--signal=USR2", job)
    wait_until("the signal to rank 0", lambda: any(has_pending(pid, signal.SIGUSR2) for pid in site.ranks()))
    site.signal_ranks(signal.SIGCONT)
    assert site.wait_for_state(job, "COMPLETED").exit_code == Exit.DONE
    (event,) = [event for event in read_lines(site.run_dir.events) if event["event"] == "profiled"]
    assert event["rank"] == 0 and Path(event["trace"]).is_file()
    assert "of rank 0: " in site.log()


def test_a_run_that_cannot_progress_is_given_up(site: Site) -> None:
    # The job is held until its data are gone.
    slurm.call("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        job = site.submit(*ONE_RANK)
        row = site.status()[0]
        assert (row["state"], row["job"]) == ("pending", job) and row["why"]
        recipe = yaml.safe_load(site.run_dir.recipe.read_text())
        recipe["data"]["train"] = [{"path": str(site.folder / "gone"), "weight": 1.0}]
        site.run_dir.recipe.write_text(yaml.safe_dump(recipe))
    finally:
        slurm.call("scontrol", "update", "PartitionName=main", "State=UP")
    ended = site.wait_for_state(job, "FAILED")
    assert (ended.exit_code, ended.restarts) == (Exit.FAILED, 2)
    assert len(site.attempts()) == 3
    assert "Rank 0 failed" in site.log() and "giving up" in site.log()
    row = site.status()[0]
    assert row["state"] == "failed" and "giving up" in row["why"]
    assert "giving up" in site.tplaunch("logs", "tiny")
    assert "gone" in site.tplaunch("logs", "tiny", "--rank", "0")


def test_a_sweep_of_four(site: Site) -> None:
    axes = ["--sweep", "optimizer.lr=1e-4,3e-4", "--sweep", "training.seed=1,2"]
    site.tplaunch("submit", "tiny.yaml", *ONE_RANK, "--set", "training.steps=3", *axes, "--wait")
    rows = site.status()
    names = ["0-lr-1e-4-seed-1", "1-lr-1e-4-seed-2", "2-lr-3e-4-seed-1", "3-lr-3e-4-seed-2"]
    assert [Path(row["run"]).name for row in rows] == names
    assert {row["state"] for row in rows} == {"done"}
    curves = []
    for name in names:
        run_dir = RunDir(site.run_dir.root / name)
        recipe = yaml.safe_load(run_dir.recipe.read_text())
        assert name.endswith(
            f"lr-{recipe['optimizer']['lr']:.0e}-seed-{recipe['training']['seed']}".replace("e-0", "e-")
        )
        assert recipe["logging"]["wandb"]["group"] == "tiny"
        curves.append(tuple(curve(run_dir)))
        assert len(curves[-1]) == 3
    assert len(set(curves)) == 4


def test_cooldowns_of_one_trunk(site: Site) -> None:
    """Each task of the array begins where the trunk stood: a job knows its parent by the run directory alone."""
    short = [*ONE_RANK, "--set", "training.steps=4"]
    site.tplaunch("submit", "tiny.yaml", *short, "--set", "lr_schedule.decay=constant", "--wait")
    cooled = ["--from", "tiny@2", "--set", "name=cooled", "--set", "lr_schedule.decay=wsd"]
    site.tplaunch("submit", "tiny.yaml", *short, *cooled, "--sweep", "lr_schedule.decay_steps=1,2", "--wait")
    trunk = {row["step"]: row for row in site.run_dir.read_metrics()}
    for decay in (1, 2):
        run_dir = RunDir(site.run_dir.root.with_name("cooled") / f"{decay - 1}-decay_steps-{decay}")
        rows = run_dir.read_metrics()
        assert [row["step"] for row in rows] == [3, 4]
        assert rows[0]["loss"] == trunk[3]["loss"] and rows[1]["lr"] < trunk[4]["lr"]
        assert (rows[0]["lr"] < trunk[3]["lr"]) == (decay == 2)
        assert (known := run_dir.history().parent) is not None and known.step == 2


def test_gone_jobs_are_told_from_the_run_directory(site: Site) -> None:
    events = [
        {"event": "submit", "jobs": ["999999"], "logs": [str(site.folder / "x.log")]},
        {"event": "attempt", "attempt": 1, "job": "999999", "nodes": ["n1"]},
    ]
    site.run_dir.create()
    shutil.copy(site.folder / "tiny.yaml", site.run_dir.recipe)
    for event in events:
        append_line(site.run_dir.events, event)
    (row,) = site.status("tiny")
    assert (row["state"], row["job"]) == ("gone", "999999")
    assert "no job of it waits or runs" in site.tplaunch("cancel", "tiny")


def test_a_bad_node_is_left_out(site: Site) -> None:
    """On the first node nvidia-smi tells of ECC errors; the next attempt runs on another."""
    (site.folder / "bin").mkdir()
    (site.folder / "bin" / "nvidia-smi").write_text("#!/bin/bash\necho '0, 5, Not Active'\n")
    (site.folder / "bin" / "nvidia-smi").chmod(0o755)
    (site.folder / "setup.sh").write_text("mkdir first 2>/dev/null && export PATH=$PWD/bin:$PATH; true\n")
    setup = f'launch.slurm.setup=["cd {site.folder}; source ./setup.sh"]'
    gpus = "launch.slurm.gpus=true"
    job = site.submit(*ONE_RANK, "--set", "training.steps=2", "--set", setup, "--set", gpus)
    ended = site.wait_for_state(job, "COMPLETED")
    (bad,) = [event["nodes"] for event in read_lines(site.run_dir.events) if event["event"] == "bad_nodes"]
    assert [ended.excluded] == bad and bad != site.attempts()[0]["nodes"]
    assert f"node {ended.excluded} is not fit: GPU 0: uncorrected ECC errors since the last reset (5)" in site.log()


def test_train_sbatch_runs_a_recipe(site: Site) -> None:
    options = ["--gres=none", "--cpus-per-task=2", "--nodes=2", "--time=10", f"--chdir={site.folder}"]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, ROOT / "slurm/train.sbatch", "tiny.yaml", "--set", "training.steps=3"],
        env={**site.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=site.folder,
        capture_output=True,
        text=True,
    )
    job = done.stdout.strip()
    site.wait_for_state(job, "COMPLETED", "FAILED")
    log = (site.folder / f"tplaunch-{job}.log").read_text()
    assert slurm.find_job(job).state == "COMPLETED", log
    assert len(curve(site.run_dir)) == 3
    assert site.status()[0]["state"] == "done"
    assert "the last step is done" in site.tplaunch("logs", job)


def test_follow_shows_the_log_to_its_end(site: Site) -> None:
    output = site.tplaunch("submit", "tiny.yaml", *ONE_RANK, "--set", "training.steps=2", "--follow")
    assert "queue  place 1 of 1" in output or "state  " in output
    assert "step 2/2" in output and "the last step is done" in output


def test_doctor_looks_at_each_node_of_an_allocation(site: Site) -> None:
    command = f"{sys.executable} -m tplaunch doctor --json"
    log = site.folder / "doctor.json"
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={log}", f"--chdir={site.folder}"]
    job = slurm.call("sbatch", "--parsable", *options, f"--wrap={command}").strip()
    site.wait_for_state(job, "COMPLETED", "FAILED")
    findings = {finding["topic"]: finding for finding in json.loads(log.read_text())}
    assert [findings[topic]["level"] for topic in ("Slurm", "requeue", "node n1", "node n3")] == ["ok"] * 4
    assert "between 2 nodes" in findings["clocks"]["text"]
    assert "topology/tree" in findings["topology"]["text"]


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "slurm").glob("*.sbatch"))])
def test_examples_are_accepted_by_slurm(name: str) -> None:
    environ = {**os.environ, "SBATCH_PARTITION": "big"}
    done = subprocess.run(
        ["sbatch", "--test-only", ROOT / "slurm" / name, "x"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


ASKED = [
    ("gpu_type=h100", "topology.gpus_per_node=8"),
    ("nodelist=b[7-8]",),
    ("exclude=b[1-60]",),
    ("licenses=matlab:2",),
    ("mail_type=END,FAIL,TIME_LIMIT_90", "mail_user=me+x@example.org"),
    ("comment='a \"b\" # c: $(d)'",),
    ("switches=1",),
    ("switches=1@2:00:00",),
    ("exclusive=true",),
    ("exclusive=user",),
    ("dependency=afterok:1:2,singleton",),
    ("dependency=afterok:1?afternotok:1",),
    ('sbatch=["--wckey=x y", "--contiguous", "--nice=10", "--begin=now+1hour", "--no-kill"]',),
    ("time=1-12",),
    ("mem=64G",),
    ("mem=0",),
]


@pytest.mark.parametrize("settings", ASKED, ids=lambda settings: settings[0])
def test_every_key_is_an_option_that_slurm_takes(site: Site, settings: tuple[str, ...]) -> None:
    """On the 64 nodes of 8 H100 that are only imagined."""
    settings = ("partition=big", "gpus=true", *settings)
    overrides = [text if text.startswith("topology.") else f"launch.slurm.{text}" for text in settings]
    words = [word for text in overrides for word in ("--set", text)]
    if any(text.startswith("topology.") for text in overrides):
        words += ["--set", "topology.tp=4", "--set", "topology.dp=2"]
    (site.folder / "job").write_text(site.tplaunch("submit", "tiny.yaml", "--dry-run", *words))
    slurm.call("sbatch", "--test-only", str(site.folder / "job"))


@pytest.mark.parametrize(
    "setting", ["gpu_type=b200", "nodelist=x[1-2]", "licenses=matlab:3", "mail_type=LUNCH", "sbatch=[--lunch=1]"]
)
def test_what_slurm_does_not_have_it_refuses_by_that_key(site: Site, setting: str) -> None:
    """So that the test above proves that each option reaches Slurm."""
    settings = ("partition=big", "gpus=true", setting)
    words = [word for text in settings for word in ("--set", f"launch.slurm.{text}")]
    (site.folder / "job").write_text(site.tplaunch("submit", "tiny.yaml", "--dry-run", *words))
    with pytest.raises(TplaunchError):
        slurm.call("sbatch", "--test-only", str(site.folder / "job"))


def test_what_is_asked_for_is_what_slurm_understands(site: Site) -> None:
    held = slurm.call("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    settings = {
        "comment": "'a \"b\" # c: $(d)'", "sbatch": '["--hold", "--nice=7"]', "gpu_type": "h100", "gpus": "true",
        "dependency": f"afterany:{held}", "licenses": "matlab:2", "nodelist": "b7", "switches": "1@4:00",
        "partition": "big", "mem": "64GiB", "time": "36h",
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"launch.slurm.{key}={value}")]
    said = slurm.call("scontrol", "show", "job", site.submit(*ONE_RANK, *words))
    for text in (
        'Comment=a "b" # c: $(d)', "Nice=7", "gpu:h100:1", "Licenses=matlab:2", "ReqNodeList=b7",
        "MinMemoryNode=64G", "TimeLimit=1-12:00:00", "Switches=1@00:04:00", f"Dependency=afterany:{held}",
    ):  # fmt: skip
        assert text in said, f"{text}\n{said}"


@pytest.mark.parametrize("option", ["time", "mem"])
def test_times_and_sizes_are_to_slurm_what_they_are_here(option: str) -> None:
    known, field = (SLURM_TIMES, "TimeLimit") if option == "time" else (SLURM_SIZES, "MinMemoryNode")
    script = ["--hold", "--partition=big", "--output=/dev/null", "--wrap=true"]
    for text, shown in known.items():
        job = slurm.call("sbatch", "--parsable", f"--{option}={text}", *script).strip()
        assert f" {field}={shown} " in slurm.call("scontrol", "show", "job", job).replace("\n", " "), text


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (["launch.slurm.gpus=true", "topology.tp=4"], "launch.slurm.cpus_per_task: 8"),  # the default: 16, of 8
        (["launch.slurm.partition=lunch"], "launch.slurm.partition: one of main, urgent, big"),
        (["launch.slurm.mem=5G"], "launch.slurm.mem: 4000M"),
        (["launch.slurm.partition=big", "launch.slurm.time=8-0"], "launch.slurm.time: 7-00:00:00"),
        (["launch.slurm.gpus=true", "launch.slurm.gpu_type=h100"], "launch.slurm.gpu_type: null"),
        (["topology.nodes=8", "topology.dp=4"], "topology.nodes: 4"),
    ],
)
def test_what_cannot_be_given_is_said_before_submitting_and_what_is_said_does(
    site: Site, settings: list[str], fix: str
) -> None:
    words = [word for text in settings for word in ("--set", text)]
    error = site.tplaunch("submit", "tiny.yaml", *words, code=Exit.USAGE)
    assert f"fix: {fix}" in error
    assert not site.run_dir.root.exists()
    key, _, value = fix.partition(": ")
    if not value.startswith("one of") and key != "topology.nodes":
        more = ["--set", f"{key}={value}"]
        (site.folder / "job").write_text(site.tplaunch("submit", "tiny.yaml", "--dry-run", *words, *more))
        slurm.call("sbatch", "--test-only", str(site.folder / "job"))


def test_after_a_refusal_status_says_what_the_run_directory_knows(site: Site) -> None:
    site.tplaunch("submit", "tiny.yaml", "--set", "launch.slurm.licenses=lunch:1", code=Exit.FAILED)
    (row,) = site.status("tiny")
    assert (row["state"], row["job"]) == ("new", "") and "never submitted" in row["why"]
    site.tplaunch("train", "tiny.yaml", *ONE_RANK, "--set", "training.steps=2")
    (row,) = site.status("tiny")
    assert (row["state"], row["step"], row["steps"], row["why"]) == ("done", 2, 2, "the last step is done")


def test_jobs_are_found_together_as_one_by_one(site: Site) -> None:
    options = ["--parsable", "--hold", "--output=/dev/null", "--wrap=true"]
    one = slurm.call("sbatch", *options).strip()
    array = slurm.call("sbatch", "--array=0-1", *options).strip()
    done = slurm.call("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3").strip()
    site.wait_for_state(done, "FAILED")
    asked = [f"{array}_1", one, "999999", done]
    found = slurm.find_jobs(asked)
    assert list(found) == [f"{array}_1", one, done]
    for job_id in (one, done):
        single = slurm.find_job(job_id)
        assert found[job_id] == slurm.Standing(
            id=single.id, state=single.state, reason=single.reason, nodes=single.nodes, restarts=single.restarts
        )
    assert found[f"{array}_1"].state == "PENDING"
    assert slurm.find_jobs(["999999"]) == slurm.find_jobs(["999998", "999999"]) == slurm.find_jobs([]) == {}


def test_scripts_are_clean(site: Site) -> None:
    files = [DEV_CLUSTER, *sorted((ROOT / "slurm").glob("*.sbatch"))]
    for runtime in (None, "pyxis", "apptainer"):
        container = "null" if runtime is None else f"{{image: a.sif, runtime: {runtime}, mounts: ['/a:/b', '/c']}}"
        script = site.tplaunch("submit", "tiny.yaml", "--dry-run", "--set", f"launch.slurm.container={container}")
        files.append(site.folder / f"{runtime}.sbatch")
        files[-1].write_text(script)
        slurm.call("sbatch", "--test-only", str(files[-1]))
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hostile_paths_are_taken_as_they_are(site: Site) -> None:
    """By the real sbatch, whose quoting of #SBATCH lines is its own: the log lies where it should."""
    place = site.folder / 'it\'s "a" #place$(touch PWNED); %j ü'
    job = site.submit(*ONE_RANK, "--set", "training.steps=1", "--run-dir", str(place))
    site.wait_for_state(job, "COMPLETED", "FAILED")
    assert "the last step is done" in (place / "slurm" / f"{job}.log").read_text()
    assert not list(site.folder.rglob("PWNED"))


def test_no_secret_is_written(site: Site) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    site.environ["WANDB_API_KEY"] = secret
    site.environ["HF_TOKEN"] = f"hf_{secret}"
    job = site.submit(*ONE_RANK, "--set", "training.steps=1")
    site.wait_for_state(job, "COMPLETED")
    for path in site.folder.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_a_run_of_stages_goes_on_with_other_workers_in_one_job(site: Site, cache: Path, tmp_path: Path) -> None:
    stages = [{"until": 5}, {"seq_len": 64, "topology": {"tp": 2, "pp": 1}}]
    settings = ["--set", f"training.stages={json.dumps(stages)}"]
    here = tmp_path / "here"
    here.mkdir()
    local = Site(here, cache)
    local.tplaunch("train", "tiny.yaml", *settings, "--set", "topology.nodes=1")
    job = site.submit(*settings)
    site.wait_for_state(job, "COMPLETED")
    assert [step for step, *_ in curve(site.run_dir)] == list(range(1, STEPS + 1))
    assert curve(site.run_dir) == curve(local.run_dir)
    assert [attempt["job"] for attempt in site.attempts()] == [job, job]
