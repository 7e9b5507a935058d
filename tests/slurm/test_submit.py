"""From a recipe to jobs, with Slurm's commands replaced: sweeps, chains, dry runs; then status, logs and cancel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit, RecipeError, TplaunchError
from tplaunch.files import append_line, read_lines
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.slurm.runs import Follower, current_job, find_runs, status_of, statuses_of, wait_for
from tplaunch.slurm.submit import plan_submission, split_values

RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 4, num_heads: 4, ffn_hidden_size: 64, vocab_size: 300}
topology: {tp: 2, pp: 1, dp: auto, nodes: 2, gpus_per_node: 4}
training: {seq_len: 16, global_batch_size: 8, steps: 8, precision: fp32}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
launch: {slurm: {gpus: false}}
"""
# A Slurm of files: $SLURM_FAKE/jobs/N holds the state of job N.
SBATCH = """#!/bin/bash
[[ $1 == --version ]] && echo slurm 22.05.8 && exit
number=$(( $(cat "$SLURM_FAKE/last" 2>/dev/null || echo 40) + 1 ))
echo $number >"$SLURM_FAKE/last"
echo PENDING >"$SLURM_FAKE/jobs/$number"
echo "sbatch $*" >>"$SLURM_FAKE/calls"
echo $number
"""
SCONTROL = """#!/bin/bash
[[ $* == *partition* ]] && { echo "PartitionName=main Default=YES TotalNodes=2 MaxTime=1-00:00:00"; exit; }
state=$(cat "$SLURM_FAKE/jobs/${3%%_*}" 2>/dev/null) || { echo "Invalid job id specified" >&2; exit 1; }
[[ $3 == *_* ]] && array="ArrayJobId=${3%%_*} ArrayTaskId=${3#*_} "
[[ $state == PENDING* ]] || nodes=n1
echo "JobId=${3%%_*} ${array}JobName=tiny"
echo "   JobState=$state Dependency=(null)"
echo "   ExitCode=0:0 StartTime=2026-01-01T00:00:00"
echo "   NodeList=${nodes:-(null)}"
"""
# As the real one, it knows nothing of a single job that is gone, and leaves out those that are gone among several.
SQUEUE = """#!/bin/bash
echo "squeue $*" >>"$SLURM_FAKE/calls"
ids=${*##*--jobs=}
[[ $* == *--jobs=* ]] || exit 0
for id in ${ids//,/ }; do
    state=$(cat "$SLURM_FAKE/jobs/${id%%_*}" 2>/dev/null) || continue
    read -r state reason restarts <<<"$state"
    [[ $state == PENDING ]] || nodes=n1
    echo "$id|$state|${reason#Reason=}|$nodes|${restarts#Restarts=}|"
    found=1
done
[[ $found || $ids == *,* ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
"""
SINFO = """#!/bin/bash
cat "$SLURM_FAKE/nodes" 2>/dev/null || printf 'main|8|4000|gpu:4\\n%.0s' 1 2
"""
RECORD = '#!/bin/bash\necho "${0##*/} $*" >>"$SLURM_FAKE/calls"\n'


class Site:
    """A working folder with a recipe, and a fake Slurm."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.fake = folder / "slurm-fake"
        (self.fake / "jobs").mkdir(parents=True)
        for name, text in {
            "sbatch": SBATCH,
            "scontrol": SCONTROL,
            "scancel": RECORD,
            "squeue": SQUEUE,
            "sinfo": SINFO,
        }.items():
            (self.fake / name).write_text(text)
            (self.fake / name).chmod(0o755)
        (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
        (folder / "tiny.yaml").write_text(RECIPE)
        monkeypatch.setenv("SLURM_FAKE", str(self.fake))
        monkeypatch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
        monkeypatch.setenv("PATH", f"{self.fake}:{os.environ['PATH']}")
        monkeypatch.chdir(folder)

    def calls(self, name: str) -> list[str]:
        path = self.fake / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(name)] if path.exists() else []

    def set_state(self, job: int, state: str) -> None:
        (self.fake / "jobs" / str(job)).write_text(state)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_dry_run_prints_the_script_and_changes_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(site.folder.rglob("*"))
    assert tplaunch(["submit", "tiny.yaml", "--dry-run"]) == Exit.DONE
    assert capsys.readouterr().out == plan_submission("tiny.yaml").script()
    assert sorted(site.folder.rglob("*")) == before


def test_what_a_job_will_read_is_said_before_it_waits(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["submit", "tiny.yaml", "--set", "training.steps=4000"]) == Exit.DONE
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("data: ", "warning: "))]
    assert " tokens, " in told[0] and "epochs by the end of the run" in told[0]
    assert "is read" in told[1] and len(told) == 2
    assert tplaunch(["submit", "tiny.yaml", "--run-dir", "many", "--sweep", "optimizer.lr=1e-4,3e-4"]) == Exit.DONE
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert len(told) == 1, "the members of a sweep read the same: once is enough"


def test_a_dry_run_is_fast_and_imports_nothing_heavy(site: Site) -> None:
    """Under 0.3 s on an idle machine; here the processor time is bounded, which load does not change much."""
    code = (
        "import sys; from tplaunch.cli.main import run; code = run(['submit', 'tiny.yaml', '--dry-run'])\n"
        "assert not {'torch', 'numpy', 'wandb', 'tokenizers'} & set(sys.modules); sys.exit(code)"
    )
    times = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        after = os.times()
        assert done.returncode == 0, done.stderr
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 1.0


def test_a_submission_is_reported_and_remembered(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.DONE
    output = capsys.readouterr().out
    log = site.folder / "runs/tiny/slurm/41.log"
    assert "job    41" in output and f"log    {log}" in output
    run = RunDir(site.folder / "runs/tiny")
    (event,) = read_lines(run.events)
    assert (event["event"], event["jobs"], event["logs"]) == ("submit", ["41"], [str(log)])
    recipe = load_recipe(run.recipe).recipe
    assert (recipe.topology.dp, recipe.topology.gpus_per_node) == (4, 4)
    assert Path(recipe.data.sources("train")[0].path + ".bin").exists()
    assert (run.slurm / "job.sbatch").read_text() == plan_submission("tiny.yaml").script()


def test_a_run_in_the_queue_is_not_submitted_again(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    tplaunch(["submit", "tiny.yaml"])
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.USAGE
    assert "job 41 of" in capsys.readouterr().err
    site.set_state(41, "COMPLETED")
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.DONE


def test_a_chain_waits_for_each_other_and_does_not_requeue(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["submit", "tiny.yaml", "--chain", "3"]) == Exit.DONE
    assert "41 -> 42 -> 43" in capsys.readouterr().out
    dependencies = [word for call in site.calls("sbatch") for word in call.split() if word.startswith("--dep")]
    assert dependencies == ["--dependency=afterany:41", "--dependency=afterany:42"]
    script = (site.folder / "runs/tiny/slurm/job.sbatch").read_text()
    assert "--no-requeue" in script
    assert not load_recipe("runs/tiny/recipe.yaml").recipe.launch.slurm.requeue


def test_a_sweep_is_one_array_with_a_run_directory_for_each_member(site: Site) -> None:
    axes = ["--sweep", "optimizer.lr=1e-4,3e-4", "--sweep", "topology.tp=2,4"]
    assert tplaunch(["submit", "tiny.yaml", *axes]) == Exit.DONE
    assert len(site.calls("sbatch")) == 1
    folders = sorted(path.parent for path in site.folder.glob("runs/tiny/*/recipe.yaml"))
    assert [folder.name for folder in folders] == [
        "0-lr-1e-4-tp-2",
        "1-lr-1e-4-tp-4",
        "2-lr-3e-4-tp-2",
        "3-lr-3e-4-tp-4",
    ]
    for task, folder in enumerate(folders):
        recipe = load_recipe(folder / "recipe.yaml").recipe
        assert (recipe.optimizer.lr, recipe.topology.tp) == ([1e-4, 3e-4][task // 2], [2, 4][task % 2])
        assert recipe.topology.dp == 8 // recipe.topology.tp
        assert (recipe.logging.wandb.group, recipe.name) == ("tiny", f"tiny-{folder.name}")
        assert recipe.logging.wandb.job_type == "sweep"
        assert read_lines(RunDir(folder).events)[0]["jobs"] == [f"41_{task}"]
    script = (site.folder / "runs/tiny/slurm/job.sbatch").read_text()
    listed = script.split("RUN_DIRS=(\n")[1].split("\n)")[0].split()
    assert listed == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["optimizer.lr"], "is not KEY=VALUE,VALUE"),
        (["=1,2"], "is not KEY=VALUE,VALUE"),
        (["launch.slurm.time=1h,2h"], "cannot be swept"),
        (["topology.nodes=1,2"], "cannot be swept"),
        (["optimizer.lr=1e-4,fast"], "optimizer.lr"),
        (["optimiser.lr=1,2"], "optimiser"),
    ],
)
def test_a_wrong_sweep_is_refused(site: Site, sweep: list[str], message: str) -> None:
    with pytest.raises((RecipeError, TplaunchError), match=message):
        plan_submission("tiny.yaml", sweep=sweep)


def test_nodes_of_unknown_size_cannot_be_filled(site: Site) -> None:
    with pytest.raises(RecipeError, match=r"tiny.yaml:4:\d+: topology.dp: auto cannot fill .*\n.*\n.*gpus_per_node: 8"):
        plan_submission("tiny.yaml", ["topology.gpus_per_node=null"])


def test_members_of_different_shape_are_refused(site: Site) -> None:
    overrides = ["topology.gpus_per_node=null", "topology.dp=2"]
    with pytest.raises(TplaunchError, match="2 nodes of 2 and 2 nodes of 4"):
        plan_submission("tiny.yaml", overrides, sweep=["topology.tp=2,4"])


def test_a_sweep_does_not_go_into_a_single_run(site: Site) -> None:
    tplaunch(["submit", "tiny.yaml"])
    with pytest.raises(TplaunchError, match="is a single run"):
        plan_submission("tiny.yaml", sweep=["optimizer.lr=1,2"])


def test_values_are_split_outside_brackets_only() -> None:
    assert split_values("1e-4,3e-4") == ["1e-4", "3e-4"]
    assert split_values("[0.9,0.95],[0.9,0.99]") == ["[0.9,0.95]", "[0.9,0.99]"]
    assert split_values("{every: 2},none") == ["{every: 2}", "none"]


def test_problems_of_the_script_say_where_they_come_from(site: Site) -> None:
    (site.folder / "tiny.yaml").write_text(RECIPE.replace("gpus: false", 'gpus: false, partition: "a b"'))
    with pytest.raises(RecipeError, match=r"tiny.yaml:7:\d+: launch.slurm.partition: 'a b' is no name"):
        plan_submission("tiny.yaml").script()


def test_a_missing_slurm_is_told_before_anything_is_made(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(site.folder))
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.USAGE
    assert "sbatch is not installed here" in capsys.readouterr().err
    assert not (site.folder / "runs").exists() and not (site.folder / "cache").exists()


# ---- status, logs, cancel


def make_run(site: Site, *events: dict) -> RunDir:
    tplaunch(["submit", "tiny.yaml"])
    run = RunDir(site.folder / "runs/tiny")
    for event in events:
        append_line(run.events, event)
    return run


ATTEMPT = {"event": "attempt", "attempt": 1, "job": "41", "nodes": ["n1"]}


def end(code: int, why: str) -> dict:
    return {"event": "attempt_end", "attempt": 1, "job": "41", "code": code, "why": why}


@pytest.mark.parametrize(
    ("slurm_state", "events", "state", "why"),
    [
        ("PENDING Reason=Priority", [], "pending", "jobs with a higher priority"),
        ("PENDING Reason=BeginTime Restarts=1", [ATTEMPT], "requeued", "requeued a moment ago"),
        ("RUNNING Reason=None", [ATTEMPT], "running", ""),
        ("COMPLETING Reason=None", [ATTEMPT], "stopping", ""),
        ("COMPLETED Reason=None", [ATTEMPT, end(0, "the last step is done")], "done", "the last step is done"),
        ("FAILED Reason=NonZeroExitCode", [ATTEMPT, end(75, "as was asked")], "stopped", "as was asked"),
        ("FAILED Reason=NonZeroExitCode", [ATTEMPT, end(1, "giving up")], "failed", "giving up"),
        ("NODE_FAIL Reason=NodeDown", [ATTEMPT], "node_fail", "a node of it is down"),
        ("TIMEOUT Reason=TimeLimit", [ATTEMPT], "timeout", "TimeLimit"),
        (None, [ATTEMPT], "gone", "Slurm does not know the job any more; its attempt 1 ended without a word"),
        (None, [], "gone", "Slurm does not know the job any more; it has not started the ranks"),
        (None, [ATTEMPT, {"event": "done", "step": 8}], "done", "the last step is done"),
        (None, [ATTEMPT, {"event": "checkpoint", "step": 4}], "gone", "the newest checkpoint is of step 4"),
        (None, [ATTEMPT, end(0, "the last step is done")], "done", "the last step is done"),
        (None, [{"event": "bad_nodes", "nodes": ["n2"]}], "failed", "bad nodes: n2"),
    ],
)
def test_status_of_every_kind_of_job(site: Site, slurm_state, events, state, why) -> None:
    run = make_run(site, *events)
    if slurm_state is None:
        (site.fake / "jobs" / "41").unlink()
    else:
        site.set_state(41, slurm_state)
    status = status_of(run)
    assert (status.job, status.state) == ("41", state)
    assert why in status.why


def prepared_run(site: Site, *events: dict) -> RunDir:
    """A run that never came to the queue: sbatch has refused it."""
    (site.fake / "sbatch").write_text(SBATCH.replace("number=", "echo 'sbatch: error: no' >&2; exit 1; number="))
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.FAILED
    run = RunDir(site.folder / "runs/tiny")
    for event in events:
        append_line(run.events, event)
    return run


HERE = {"event": "attempt", "attempt": 1, "job": "", "nodes": []}


@pytest.mark.parametrize(
    ("events", "state", "why"),
    [
        ([], "new", "never submitted, and never started on this machine"),
        ([HERE, end(0, "the last step is done")], "done", "the last step is done"),
        ([HERE, {"event": "done", "step": 8}], "done", "the last step is done"),
        ([HERE, {"event": "checkpoint", "step": 4}, {"event": "stopped", "step": 4}], "stopped", "is of step 4"),
        ([HERE], "failed", "its attempt 1 ended without a word, without a checkpoint"),
    ],
)
def test_status_of_a_run_that_slurm_never_had_is_what_its_directory_knows(site: Site, events, state, why) -> None:
    status = status_of(prepared_run(site, *events))
    assert (status.job, status.state) == ("", state)
    assert status.why.endswith(why) and "Slurm" not in status.why
    assert len(site.calls("squeue")) == 0


def test_status_of_a_run_on_this_machine_that_goes_on(site: Site) -> None:
    run = prepared_run(site, HERE)
    with run.lock():
        assert status_of(run).state == "running"
    assert status_of(run).state == "failed"
    with run.lock():  # which asking did not take
        pass


def test_a_run_that_went_on_on_this_machine_is_not_its_old_job(site: Site) -> None:
    run = make_run(site, ATTEMPT, end(1, "failed"), HERE, {"event": "done", "step": 8})
    site.set_state(41, "FAILED Reason=NonZeroExitCode")
    assert status_of(run).state == "done"


def test_status_asks_the_controller_once(site: Site) -> None:
    tplaunch(["submit", "tiny.yaml", "--chain", "3"])
    for k in (1, 2):
        tplaunch(["submit", "tiny.yaml", "--run-dir", f"runs/more-{k}"])
    (site.fake / "calls").unlink()
    (site.fake / "jobs" / "44").unlink()
    assert [row.state for row in statuses_of(find_runs(()))] == ["gone", "pending", "pending"]
    assert len(site.calls("squeue")) == 1


@pytest.mark.parametrize(
    ("setting", "key", "fix"),
    [
        ("launch.slurm.gpus=true", "cpus_per_task", "launch.slurm.cpus_per_task: 8"),
        ("launch.slurm.partition=gpu", "partition", "launch.slurm.partition: one of main"),
        ("launch.slurm.time=2-0", "time", "launch.slurm.time: 1-00:00:00"),
        ("launch.slurm.mem=5G", "mem", "launch.slurm.mem: 4000M"),
        ("topology.nodes=4", "topology.nodes", "topology.nodes: 2"),
    ],
)
def test_what_the_cluster_cannot_give_is_said_before_data_are_prepared(
    site: Site, capsys: pytest.CaptureFixture[str], setting: str, key: str, fix: str
) -> None:
    assert tplaunch(["submit", "tiny.yaml", "--set", setting]) == Exit.USAGE
    error = capsys.readouterr().err
    assert key in error and f"fix: {fix}" in error
    assert not (site.folder / "runs").exists() and not site.calls("sbatch")


def test_a_refusal_of_sbatch_names_the_key(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    said = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    (site.fake / "sbatch").write_text(SBATCH.replace("number=", f"echo '{said}' >&2; exit 1; number="))
    assert tplaunch(["submit", "tiny.yaml"]) == Exit.FAILED
    error = capsys.readouterr().err
    assert said in error and "fix: change launch.slurm.account; see yours: sacctmgr" in error


def test_status_shows_figures_and_the_time_that_is_left(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(site, ATTEMPT)
    site.set_state(41, "RUNNING Reason=None")
    record = {"step": 6, "time": time.time(), "loss": 1.25, "tokens_per_s": 2000.0, "step_time_s": 30.0}
    run.metrics.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert tplaunch(["status"]) == Exit.DONE
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "runs/tiny", "41", "running", "n1", "1", "6/8", "1.2500", "2.00K", "1m00s",
    ]  # fmt: skip
    assert tplaunch(["status", "--json", "41"]) == Exit.DONE
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["step"], row["seconds_left"]) == ("running", 6, 60.0)


def test_status_counts_lines_that_are_no_records(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(site, ATTEMPT)
    site.set_state(41, "RUNNING Reason=None")
    good = {"step": 5, "loss": 1.5, "tokens_per_s": 2000.0}
    for record in (good, {**good, "step": 6, "loss": "low"}, {**good, "step": "7"}):
        append_line(run.metrics, record)
    capsys.readouterr()
    assert tplaunch(["status"]) == Exit.DONE
    line = capsys.readouterr().out.splitlines()[1]
    assert "5/8" in line and "1.5000" in line and "2 bad lines of metrics.jsonl left out" in line


def test_status_of_a_chain_speaks_of_the_job_that_counts(site: Site) -> None:
    tplaunch(["submit", "tiny.yaml", "--chain", "3"])
    history = RunDir(site.folder / "runs/tiny").history()
    for states, job in [
        (("RUNNING", "PENDING", "PENDING"), "41"),
        (("COMPLETED", "RUNNING", "PENDING"), "42"),
        (("COMPLETED", "COMPLETED", "CANCELLED"), "42"),
    ]:
        for number, state in zip((41, 42, 43), states, strict=True):
            # A job that is cancelled while it waits has no nodes.
            site.set_state(number, f"{state} Reason=None" if state != "CANCELLED" else "PENDING")
        if states[2] == "CANCELLED":
            (site.fake / "jobs" / "43").unlink()
        assert current_job(history)[0] == job


def test_an_empty_folder_has_a_next_step(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["status"]) == Exit.DONE
    assert "tplaunch submit RECIPE" in capsys.readouterr().out


def test_runs_are_found_by_path_name_job_and_sweep(site: Site) -> None:
    tplaunch(["submit", "tiny.yaml", "--sweep", "optimizer.lr=1e-4,3e-4"])
    both = [site.folder / "runs/tiny/0-lr-1e-4", site.folder / "runs/tiny/1-lr-3e-4"]
    for targets, expected in [
        ([], both),
        (["tiny"], both),
        (["runs/tiny"], both),
        ([str(both[1])], both[1:]),
        (["tiny/0-lr-1e-4"], both[:1]),
        (["41"], both),
        (["41_1"], both[1:]),
    ]:
        assert [run.root.absolute() for run in find_runs(targets)] == expected, targets
    with pytest.raises(TplaunchError, match="'nope' is no run directory"):
        find_runs(["nope"])


def test_cancel_takes_waiting_jobs_first_and_asks_the_running_one(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    tplaunch(["submit", "tiny.yaml", "--chain", "3"])
    site.set_state(41, "RUNNING Reason=None")
    assert tplaunch(["cancel", "tiny"]) == Exit.DONE
    assert site.calls("scancel") == ["scancel --quiet 42 43", "scancel --quiet --batch --signal=TERM 41"]
    assert tplaunch(["cancel", "tiny", "--now"]) == Exit.DONE
    assert site.calls("scancel")[2:] == ["scancel --quiet 42 43 41"]
    site.set_state(41, "COMPLETED Reason=None")
    for number in (42, 43):
        (site.fake / "jobs" / str(number)).unlink()
    capsys.readouterr()
    assert tplaunch(["cancel", "41"]) == Exit.DONE
    assert "no job of it waits or runs" in capsys.readouterr().out


def test_logs_of_the_job_and_of_a_rank(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(site)
    (run.slurm / "41.log").write_text("from the job\n")
    for attempt, text in ((2, "old"), (10, "new")):
        run.attempt_dir(attempt).mkdir(parents=True)
        run.rank_log(attempt, 3).write_text(f"{text} of rank 3\n")
    capsys.readouterr()
    assert tplaunch(["logs", "tiny"]) == Exit.DONE
    assert tplaunch(["logs", "tiny", "--rank", "3"]) == Exit.DONE
    assert capsys.readouterr().out == "from the job\nnew of rank 3\n"
    assert tplaunch(["logs", "tiny", "--rank", "4"]) == Exit.USAGE
    assert "rank 4" in capsys.readouterr().err


def test_following_goes_over_to_the_next_attempt(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    current = first
    log = Follower(lambda: current)
    assert "".join(log.read()) == ""
    first.write_text("a")
    assert "".join(log.read()) == "a"
    first.write_text("ab")
    second.write_text("c")
    current = second
    assert "".join(log.read()) == "bc"


def test_waiting_returns_how_the_run_ended(site: Site) -> None:
    run = make_run(site, ATTEMPT, end(75, "asked"))
    site.set_state(41, "FAILED Reason=NonZeroExitCode")
    assert wait_for([run]) == Exit.STOPPED
    append_line(run.events, ATTEMPT)
    append_line(run.events, end(0, "done"))
    assert wait_for([run]) == Exit.DONE
    append_line(run.events, ATTEMPT)
    assert wait_for([run]) == Exit.FAILED
