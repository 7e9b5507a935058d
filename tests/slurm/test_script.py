"""The batch script: what it says, that no string of a recipe can change what runs, and 1,024 nodes by simulation."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tplaunch.errors import RecipeError
from tplaunch.launch.torchrun import Rendezvous, torchrun_argv
from tplaunch.recipe.schema import Recipe, Training
from tplaunch.slurm.script import all_mounts, data_folders, find_problems, how_it_runs, write_script
from tplaunch.spec.topology import Topology

MODEL = {"hidden_size": 64, "num_layers": 4, "num_heads": 8, "ffn_hidden_size": 128, "vocab_size": 512}


def recipe_of(*, topology: dict | None = None, data: dict | None = None, **slurm) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": MODEL,
            "topology": topology or {},
            "training": {"seq_len": 32, "global_batch_size": 8, "steps": 10},
            "data": data or {"train": "/data/corpus/a", "tokenizer": "/data/tokenizer.json"},
            "launch": {"slurm": slurm},
        }
    )


TWO_NODES = Topology(tp=2, dp=2, pp=2, gpus_per_node=4)
RUN = Path("/shared/runs/tiny")


def script_of(recipe: Recipe, topology: Topology = TWO_NODES, runs: list[Path] | None = None, **more) -> str:
    runs = runs or [RUN]
    return write_script(recipe, topology, runs, log_dir=runs[0] / "slurm", **{"python": "/venv/bin/python", **more})


def options_of(script: str) -> list[str]:
    """The options in the #SBATCH lines, comments taken off."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    return [re.sub(r"  # [^\"]*$", "", line).removeprefix("#SBATCH ").rstrip() for line in lines]


def test_the_header_says_what_the_recipe_asks_for() -> None:
    recipe = recipe_of(
        partition="gpu",
        account="proj-1",
        qos="high",
        reservation="week1",
        constraint="[rack1|rack2]*2",
        exclude="n[3,7-9]",
        time="1-1:01:01",
        mem="16385M",
        gpu_type="h100",
        nodelist="n[1-2]",
        licenses="matlab:2,ansys",
        switches="1@2:00:00",
        dependency="afterok:12:13,singleton",
        mail_type="END,FAIL",
        mail_user="me+x@example.org",
        exclusive=True,
        comment='a "b" # c',
        sbatch=["--wckey=x y", "--contiguous"],
        cpus_per_task=24,
        grace=90.5,
    )
    assert options_of(script_of(recipe)) == [
        "--job-name=tiny",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=gpu:h100:4",
        "--cpus-per-task=24",
        "--mem=16385M",
        "--time=1-01:02:00",
        "--partition=gpu",
        "--account=proj-1",
        "--qos=high",
        "--reservation=week1",
        "--constraint=[rack1|rack2]*2",
        "--nodelist=n[1-2]",
        "--exclude=n[3,7-9]",
        "--licenses=matlab:2,ansys",
        "--switches=1@2:00:00",
        "--dependency=afterok:12:13,singleton",
        "--mail-type=END,FAIL",
        "--mail-user=me+x@example.org",
        "--exclusive",
        r'--comment="a \"b\" # c"',
        '--wckey="x y"',
        "--contiguous",
        "--requeue",
        "--signal=B:USR1@91",
        "--open-mode=append",
        "--output=/shared/runs/tiny/slurm/%j.log",
    ]


@pytest.mark.parametrize(("name", "runtime"), [("train", None), ("container", "pyxis")])
def test_the_examples_run_what_a_submitted_script_runs(name: str, runtime: str | None) -> None:
    text = (Path(__file__).parents[2] / "slurm" / f"{name}.sbatch").read_text()
    assert text.endswith(how_it_runs(runtime))
    begin, end = "# ---- the environment", "# ---- what runs"
    ours = script_of(recipe_of())
    ours = ours[ours.index(begin) : ours.index(end)].splitlines()
    theirs = text[text.index(begin) : text.index(end)].splitlines()
    assert [line for line in theirs if not line.startswith(("# module", "# source"))] == ours


def test_what_is_not_asked_for_is_left_to_slurm() -> None:
    options = options_of(script_of(recipe_of(gpus=False, requeue=False)))
    assert "--cpus-per-task=4" in options  # one a rank
    assert "--no-requeue" in options
    assert not [o for o in options if o.startswith(("--gres", "--mem", "--time", "--partition"))]


def test_a_sweep_is_an_array_whose_tasks_have_their_own_run_directories(bench: Bench) -> None:
    runs = [bench.folder / f"run {k}" for k in range(3)]
    script = script_of(recipe_of(gpus=False), runs=runs, python=str(bench.python))
    assert "--array=0-2" in options_of(script)
    assert options_of(script)[-1] == f'--output="{runs[0]}/slurm/%A_%a.log"'
    assert bench.run(script, runs, SLURM_ARRAY_TASK_ID="1").run_dir == str(runs[1])


def test_setup_and_modules_come_before_the_recipes_environment() -> None:
    recipe = recipe_of(modules=["cuda/12.8", "nccl"], setup=["source /venv/bin/activate"], env={"A": "x y"})
    lines = script_of(recipe).splitlines()
    order = ["module load cuda/12.8", "module load nccl", "source /venv/bin/activate", "export A='x y'"]
    assert [line for line in lines if line in order] == order


@pytest.mark.parametrize(
    ("slurm", "key"),
    [
        ({"partition": "a b"}, "launch.slurm.partition"),
        ({"partition": "gpu\n#SBATCH --wrap=x"}, "launch.slurm.partition"),
        ({"account": "$(id)"}, "launch.slurm.account"),
        ({"qos": "-x"}, "launch.slurm.qos"),
        ({"reservation": ""}, "launch.slurm.reservation"),
        ({"constraint": "a # b"}, "launch.slurm.constraint"),
        ({"exclude": "n1;n2"}, "launch.slurm.exclude"),
        ({"modules": ["x; rm"]}, "launch.slurm.modules"),
        ({"env": {"a-b": "1"}}, "launch.slurm.env"),
        ({"env": {"RUN_DIR": "/elsewhere"}}, "launch.slurm.env.RUN_DIR"),
        ({"env": {"SLURM_NODEID": "0"}}, "launch.slurm.env.SLURM_NODEID"),
        ({"env": {"A": "\0"}}, "launch.slurm.env.A"),
        ({"env": {"A": "\ud800"}}, "launch.slurm.env.A"),
        ({"env": {"WANDB_API_KEY": "0123"}}, "launch.slurm.env.WANDB_API_KEY"),
        ({"env": {"HF_TOKEN": "hf_x"}}, "launch.slurm.env.HF_TOKEN"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "launch.slurm.env.AWS_SECRET_ACCESS_KEY"),
        ({"env": {"db_password": "x"}}, "launch.slurm.env.db_password"),
        ({"setup": ["export WANDB_API_KEY=0123"]}, "launch.slurm.setup"),
        ({"setup": ["cd x; HF_TOKEN='hf_x' true"]}, "launch.slurm.setup"),
        ({"setup": ["echo 'open"]}, "launch.slurm.setup"),
        ({"setup": ["if true; then"]}, "launch.slurm.setup"),
        ({"grace": 70000.0}, "launch.slurm.grace"),
        ({"time": "1:00", "grace": 60.0}, "launch.slurm.time"),
        ({"gpu_type": "h100:8"}, "launch.slurm.gpu_type"),
        ({"gpu_type": "h100", "gpus": False}, "launch.slurm.gpu_type"),
        ({"nodelist": "n1 n2"}, "launch.slurm.nodelist"),
        ({"licenses": "a b"}, "launch.slurm.licenses"),
        ({"switches": "one"}, "launch.slurm.switches"),
        ({"dependency": "afterok: 12"}, "launch.slurm.dependency"),
        ({"mail_type": "END, FAIL"}, "launch.slurm.mail_type"),
        ({"mail_user": "me\n#SBATCH --wrap=x"}, "launch.slurm.mail_user"),
        ({"comment": "a\nb"}, "launch.slurm.comment"),
        ({"comment": "a\\"}, "launch.slurm.comment"),
        ({"comment": "\ud800"}, "launch.slurm.comment"),
        ({"sbatch": ["--contiguous", "wckey=x"]}, "launch.slurm.sbatch[1]"),
        ({"sbatch": ["-p gpu"]}, "launch.slurm.sbatch[0]"),
        ({"sbatch": ["--wckey=x\n#SBATCH --wrap=x"]}, "launch.slurm.sbatch[0]"),
        ({"sbatch": ["--wckey x"]}, "launch.slurm.sbatch[0]"),
        ({"container": {"image": "--privileged"}}, "launch.slurm.container.image"),
        ({"container": {"image": "a\nb"}}, "launch.slurm.container.image"),
        ({"container": {"image": "a", "mounts": ["/a:/b,/etc:/etc"]}}, "launch.slurm.container.mounts"),
        ({"container": {"image": "a", "mounts": ["relative:/b"]}}, "launch.slurm.container.mounts"),
    ],
)
def test_what_slurm_or_the_shell_cannot_take_is_refused(slurm: dict, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        script_of(recipe_of(**slurm))
    (problem,) = caught.value.problems
    assert problem.key == key


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("--nodes=4", "say it by topology.nodes"),
        ("--time=1:00", "say it by launch.slurm.time"),
        ("--exclusive", "say it by launch.slurm.exclusive"),
        ("--mail-type=END", "say it by launch.slurm.mail_type"),
        ("--gres=gpu:2", "say it by topology.gpus_per_node and launch.slurm.gpu_type"),
        ("--outp=x", "say it by --run-dir of tplaunch submit"),  # sbatch takes the beginning of a name
        ("--test-only", "say it by --dry-run of tplaunch submit"),
        ("--wrap=x", "leave it out"),
    ],
)
def test_options_that_tplaunch_sets_itself_are_refused_with_where_to_say_it(line: str, fix: str) -> None:
    (problem,) = find_problems(recipe_of(sbatch=[line]), TWO_NODES, [RUN])
    assert problem.fix == fix and "is set by tplaunch itself" in problem.what


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    env = {"TOKENIZERS_PARALLELISM": "false", "NCCL_IB_TC": "1"}
    setup = ["export HF_TOKEN=$(cat ~/.hf)", 'export WANDB_API_KEY="$KEY"', "export TOKENIZERS_PARALLELISM=false"]
    assert list(find_problems(recipe_of(env=env, setup=setup), TWO_NODES, [RUN])) == []


def test_all_problems_are_told_at_once() -> None:
    recipe = recipe_of(partition="a b", env={"HF_TOKEN": "x"}, grace=70000.0)
    assert len(list(find_problems(recipe, TWO_NODES, [Path("/a\\b")]))) == 4


def test_a_half_filled_node_is_refused() -> None:
    with pytest.raises(RecipeError, match="6 ranks do not fill 2 nodes of 4"):
        script_of(recipe_of(), Topology(tp=2, dp=3, gpus_per_node=4))


def test_mounts_are_added_for_what_no_mount_shows() -> None:
    recipe = recipe_of(data={"train": [{"path": "/data/corpus/a"}, {"path": "/scratch/b"}], "tokenizer": "/t/tok.json"})
    assert all_mounts(["/data:/data:ro", "/t:/other"], [RUN, *data_folders(recipe)]) == [
        "/data:/data:ro",
        "/t:/other",
        "/shared/runs/tiny:/shared/runs/tiny",
        "/scratch:/scratch",
        "/t:/t",
    ]


# ---- the script, run by a real bash, with srun and python replaced by recorders

PYTHON = """#!/bin/bash
printf '%s\\0' "$0" "$@" '' >>"$RECORD/calls"
case $3 in
    nodes) cat >/dev/null; echo n1; echo n2 ;;
    run) shift 4; exec "$@" ;;
    --nnodes=*) env -0 >"$RECORD/env" ;;
esac
"""
# Drops srun's options, which all start with a dash, and runs the rest as the second of two tasks.
SRUN = """#!/bin/bash
printf '%s\\0' "$0" "$@" '' >>"$RECORD/calls"
while [[ $1 == -* ]]; do shift; done
export SLURM_PROCID=1
"$@"
"""
APPTAINER = """#!/bin/bash
printf '%s\\0' "$0" "$@" '' >>"$RECORD/calls"
while [[ $1 != python3 && $1 != bash ]]; do shift; done
exec "$@"
"""


class Trace:
    """What a script ran."""

    def __init__(self, record: Path) -> None:
        calls = (record / "calls").read_bytes().decode().split("\0\0")
        self.calls = [call.split("\0") for call in calls if call]
        pairs = (record / "env").read_bytes().decode().split("\0")
        self.env = dict(pair.split("=", 1) for pair in pairs if pair)
        (self.torchrun,) = (call for call in self.calls if call[1:3] == ["-m", "torch.distributed.run"])
        self.run_dir = self.torchrun[-1]


class Bench:
    """Runs scripts in an empty folder and records what they start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.count = 0
        self.bin.mkdir()
        stubs = {"python": PYTHON, "python3": PYTHON, "srun": SRUN, "apptainer": APPTAINER}
        for name, text in stubs.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, run_dirs: list[Path], **environ: str) -> Trace:
        self.output(script, run_dirs, **environ)
        return Trace(self.folder / f"record-{self.count}")

    def output(self, script: str, run_dirs: list[Path], **environ: str) -> str:
        """Runs a script and returns what it prints."""
        self.count += 1
        record, cwd = self.folder / f"record-{self.count}", self.folder / f"cwd-{self.count}"
        record.mkdir()
        cwd.mkdir()
        for run_dir in run_dirs:
            (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
        (cwd / "job").write_text(script)
        done = subprocess.run(
            ["bash", "job"],
            cwd=cwd,
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "RECORD": str(record),
                "SLURM_JOB_ID": "10042",
                "SLURM_NNODES": "2",
                "SLURM_CPUS_PER_TASK": "16",
                **environ,
            },
            capture_output=True,
            timeout=120,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert [path.name for path in cwd.iterdir()] == ["job"], "the script wrote where it should not"
        return done.stdout


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_each_node_runs_one_torchrun_in_node_order(bench: Bench) -> None:
    run = bench.folder / "run"
    trace = bench.run(script_of(recipe_of(), runs=[run], python=str(bench.python)), [run])
    assert trace.torchrun[1:] == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=4",
        "--master-addr=n1",
        "--master-port=20042",
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",
        "-m",
        "tplaunch.worker",
        str(run),
    ]
    assert trace.env["OMP_NUM_THREADS"] == "4"
    assert trace.env["SLURM_HOSTFILE"] == str(run / "slurm" / "hosts-10042")
    assert (run / "slurm" / "hosts-10042").read_text() == "n1\nn2\n"
    # The ranks run the same module on the same directory as `tplaunch train` and `command` start.
    elsewhere = torchrun_argv(run, 4, rendezvous=Rendezvous(2, "n1:1", "x"))
    assert trace.torchrun[-3:] == elsewhere[-3:]


def test_torchrun_ignores_the_signals_that_are_meant_for_the_ranks(bench: Bench) -> None:
    """`trap ""` is inherited through exec: bits 10 (USR1), 12 (USR2) and 15 (TERM) of the kernel's mask of ignored
    signals."""
    (bench.bin / "python").write_text(PYTHON.replace("env -0", "grep SigIgn /proc/$$/status >&2; env -0"))
    (bench.bin / "srun").write_text(SRUN.replace('"$@"\n', '"$@" 2>>"$RECORD/srun-stderr"\n'))
    run = bench.folder / "run"
    bench.run(script_of(recipe_of(), runs=[run], python=str(bench.python)), [run])
    mask = int((bench.folder / "record-1" / "srun-stderr").read_text().split("SigIgn:")[1].split()[0], 16)
    assert mask & (1 << 9) and mask & (1 << 11) and mask & (1 << 14)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers_hold_the_check_and_the_ranks(bench: Bench, runtime: str) -> None:
    run = bench.folder / "run"
    container = {"image": "nvcr.io#nvidia/pytorch:25", "runtime": runtime, "mounts": ["/data:/data:ro"]}
    trace = bench.run(script_of(recipe_of(container=container), runs=[run], python=str(bench.python)), [run])
    mounts = f"/data:/data:ro,{run}:{run}"
    if runtime == "pyxis":
        wanted = [f"--container-image={container['image']}", f"--container-mounts={mounts}"]
        wrapped = [call for call in trace.calls if call[0].endswith("/srun")]
    else:
        wanted = ["exec", "--nv", "--bind", mounts, container["image"]]
        wrapped = [call for call in trace.calls if call[0].endswith("/apptainer")]
    assert len(wrapped) == 2
    for call in wrapped:
        at = call.index(wanted[0])
        assert call[at : at + len(wanted)] == wanted
    # The container's own python runs the ranks; the one outside runs what speaks to Slurm.
    assert trace.torchrun[0].endswith("/python3")
    assert [call[3] for call in trace.calls if call[0] == str(bench.python)] == ["nodes", "run"]


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "$(touch PWNED)", "`touch PWNED`", "'; touch PWNED; '", '"; touch PWNED; "', "\n touch PWNED\n",
                "${RUN_DIR}", "$HOME", "\\", "'", '"', "#", "!", "~", "*", "%j", "%%", " ", "\t", "&", "|", ">PWNED",
                "EOF", "#SBATCH --nodes=9", "=", "-", "ü", "\r", "$'\\x41'", "\x7f", ":", ",", "CONTAINER", "..",
            ]
        ),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
    ),
    max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(HOSTILE, max_size=3),
    folder=HOSTILE,
    python=HOSTILE,
    image=HOSTILE,
    mount=HOSTILE,
    data=HOSTILE,
    runtime=st.sampled_from([None, "pyxis", "apptainer"]),
)
def test_hostile_strings_never_change_what_runs(
    shared_bench: Bench,
    values: list[str],
    folder: str,
    python: str,
    image: str,
    mount: str,
    data: str,
    runtime: str | None,
) -> None:
    bench = shared_bench
    run = bench.folder / f"runs-{bench.count}" / folder.replace("/", "_").encode(errors="replace").decode()[:60]
    env = {f"V{k}": value for k, value in enumerate(values)}
    container = {"image": image, "runtime": runtime, "mounts": [f"/{mount}:/x"]} if runtime else None
    recipe = recipe_of(env=env, container=container, data={"train": f"/d/{data}/x", "tokenizer": None})
    try:
        script = script_of(recipe, runs=[run], python=str(bench.python), folders=data_folders(recipe))
    except RecipeError:
        return
    trace = bench.run(script, [run])
    assert trace.run_dir == str(run)
    assert {name: trace.env[name] for name in env} == env
    kinds = [(Path(call[0]).name, *(word for word in call if word in ("nodes", "run"))) for call in trace.calls]
    outside = [("srun",), ("python", "nodes"), ("python", "run"), ("srun",)]
    inside = [("python",)] * 2 if runtime is None else [("python3",)] * 2
    inside += [("apptainer",)] * 2 if runtime == "apptainer" else []
    assert sorted(kind[:2] for kind in kinds) == sorted([*outside, *inside])
    if runtime == "pyxis":
        (*_, last) = (call for call in trace.calls if call[0].endswith("/srun"))
        assert f"--container-image={image}" in last


@settings(max_examples=200, deadline=None)
@given(text=HOSTILE, field=st.sampled_from(["partition", "account", "qos", "reservation", "constraint", "exclude"]))
def test_a_name_is_refused_or_stands_in_its_line_as_it_is(text: str, field: str) -> None:
    plain = options_of(script_of(recipe_of()))
    try:
        script = script_of(recipe_of(**{field: text}))
    except RecipeError:
        return
    assert sorted(options_of(script)) == sorted([*plain, f"--{field}={text}"])
    assert not re.search(r"[\s#'\"\\$`;&]", text) or field == "constraint"


def test_no_secret_of_the_environment_reaches_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t-value")
    assert "s3cr3t-value" not in script_of(recipe_of())


# ---- 1,024 nodes


def test_a_thousand_nodes_get_their_ranks_in_order(bench: Bench) -> None:
    """TP4 x CP4 x PP16 x DP32 on 1,024 nodes of 8: each node's torchrun line, as the script makes it, against loops."""
    tp, cp, pp, dp, per_node, nodes = 4, 4, 16, 32, 8, 1024
    topology = Topology(tp=tp, cp=cp, dp=dp, pp=pp, gpus_per_node=per_node)
    recipe = recipe_of(topology={"tp": tp, "cp": cp, "pp": pp, "dp": dp, "nodes": nodes})
    run = bench.folder / "run"
    begun = time.process_time()
    script = script_of(recipe, topology, [run], python=str(bench.python))
    assert time.process_time() - begun < 0.3
    assert "--nodes=1024" in options_of(script)
    # This srun starts a task for each node; their "python" prints the words it was given.
    (bench.bin / "srun").write_text("""#!/bin/bash
        [[ $* == *node_check* ]] && exit
        while [[ $1 == -* ]]; do shift; done
        export PYTHON=/bin/echo
        for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_PROCID=$i "$@"; done
    """)
    environ = {"SLURM_NNODES": str(nodes), "SLURM_CPUS_PER_TASK": "32"}
    lines = bench.output(script, [run], **environ).splitlines()
    torchruns = [dict(word.split("=", 1) for word in line.split() if word.startswith("--n")) for line in lines]
    assert [int(line["--node-rank"]) for line in torchruns] == list(range(nodes))
    place = {}
    for line in torchruns:
        for local in range(int(line["--nproc-per-node"])):
            place[int(line["--node-rank"]) * per_node + local] = int(line["--node-rank"])
    rank = 0
    for p, d, c, t in product(range(pp), range(dp), range(cp), range(tp)):
        assert topology.coordinates(rank) == (t, c, d, p)
        assert place[rank] == topology.node(rank)
        assert {place[member] for member in topology.group("tp", rank)} == {place[rank]}
        assert len({place[member] for member in topology.group("cp", rank)}) == 2
        rank += 1
    assert rank == len(place) == 8192


def test_a_script_says_how_experts_are_spread() -> None:
    assert "# 8 ranks = tp 2 x pp 2 x dp 2\n" in script_of(recipe_of())
    spread = script_of(recipe_of(), replace(TWO_NODES, ep=4))
    assert "# 8 ranks = tp 2 x pp 2 x dp 2, experts ep 4 x edp 1\n" in spread


def test_stages_keep_the_nodes_and_ranks_of_their_job() -> None:
    recipe = recipe_of(topology={"tp": 2, "dp": 2, "pp": 2, "nodes": 2})
    stages = [{"until": 5}, {"until": 7, "topology": {"tp": 4, "pp": 1}}, {"topology": {"tp": 8}}]
    training = Training.model_validate({"seq_len": 32, "global_batch_size": 8, "steps": 10, "stages": stages})
    (problem,) = find_problems(recipe.model_copy(update={"training": training}), TWO_NODES, [RUN])
    assert problem.key == "training.stages[2].topology" and "2 x 8 ranks in stage 3" in problem.what
