"""Branches: a new run that goes on from a step of another (`--from RUN@STEP`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes import copied, work_in
from tplaunch.checkpoint.store import find_checkpoints, goes_on_from, read_manifest
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit, RecipeError, TplaunchError
from tplaunch.files import read_lines
from tplaunch.recipe.load import load_recipe
from tplaunch.report.curves import Curves
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Branched, Resumed
from tplaunch.slurm.submit import plan_submission, prepare_run

RECIPE = """
name: trunk
model: {hidden_size: 32, num_layers: 1, num_heads: 4, ffn_hidden_size: 64, vocab_size: 300}
topology: {dp: 1}
training: {seq_len: 16, global_batch_size: 2, steps: 6, precision: fp32}
optimizer: {lr: 1.0e-3}
lr_schedule: {warmup_steps: 2, decay: constant}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
checkpoint: {every: 2, keep: 9}
logging: {every: 1, wandb: {mode: disabled}}
"""
DECAYED = ("lr_schedule.decay=wsd", "lr_schedule.decay_steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of six steps, saved at every second."""
    folder = tmp_path_factory.mktemp("trunk")
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch, RECIPE)
        patch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
        assert tplaunch(["train", "tiny.yaml"]) == Exit.DONE
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change."""
    return copied(trained, tmp_path / "copy", monkeypatch)


def branch(name: str, parent: str, *settings: str, verb: str = "train", more: tuple[str, ...] = ()) -> int:
    """The exit code of a branch; `command` makes all of it ready but the ranks."""
    sets = [word for setting in (f"name={name}", *settings) for word in ("--set", setting)]
    return tplaunch([verb, "tiny.yaml", "--from", parent, *sets, *more])


def losses(name: str) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and rate of each step of a run."""
    return {
        one["step"]: (one["loss_last"], one["grad_norm"], one["lr"])
        for one in RunDir(Path("runs") / name).read_metrics()
    }


def test_a_branch_of_the_same_recipe_repeats_its_trunk(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch("again", "trunk@4") == Exit.DONE
    assert f"branch: goes on from trunk@4, {here}/runs/trunk/checkpoints/step-00000004" in capsys.readouterr().err
    trunk, again = losses("trunk"), losses("again")
    assert sorted(again) == [5, 6]
    assert all(again[step] == trunk[step] for step in again), "bit for bit"
    run = RunDir(here / "runs/again")
    events = run.history().events
    (begun,) = [event for event in events if isinstance(event, Branched)]
    assert (begun.parent, begun.step) == (str(here / "runs/trunk"), 4)
    assert [event.step for event in events if isinstance(event, Resumed)] == [4]
    own, trunks = (read_manifest(root / "checkpoints/step-00000006") for root in (run.root, here / "runs/trunk"))
    assert own.about["parent"] == str(here / "runs/trunk") and own.about["parent_step"] == 4
    assert "parent" not in trunks.about
    assert own.state["progress"] == trunks.state["progress"]


def test_a_cooldown_restarts_from_its_trunk_and_then_from_its_own(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, began = RunDir(here / "runs/cooled"), here / "runs/trunk/checkpoints/step-00000004"
    monkeypatch.setenv("TPLAUNCH_FAULT", "rank=0,step=5,kind=exception")
    assert branch("cooled", "runs/trunk@4", *DECAYED, "launch.max_restarts=1") == Exit.DONE
    assert "changed: lr_schedule.decay: constant -> wsd" in capsys.readouterr().err
    events = run.history().events
    assert [event.step for event in events if isinstance(event, Resumed)] == [4, 4], "it had saved nothing of its own"
    cooled, trunk = losses("cooled"), losses("trunk")
    assert cooled[5][0] == trunk[5][0] and cooled[6][2] < cooled[5][2] < trunk[5][2] == trunk[6][2]
    shutil.move(began, here / "elsewhere")  # its own checkpoints are all that it needs by now
    assert branch("cooled", "runs/trunk@4", *DECAYED, "training.steps=8", "lr_schedule.decay_steps=4") == Exit.DONE
    events = run.history().events
    assert [event.step for event in events if isinstance(event, Resumed)] == [4, 4, 6]
    assert sum(isinstance(event, Branched) for event in events) == 1
    assert sorted(losses("cooled")) == [5, 6, 7, 8]


def test_the_newest_is_taken_where_no_step_is_named_and_kept(here: Path) -> None:
    more = "training.steps=9"
    assert branch("later", "trunk", more, verb="command") == Exit.DONE
    run = RunDir(here / "runs/later")
    assert (known := run.history().parent) is not None and known.step == 6
    newer = here / "runs/trunk/checkpoints/step-00000008"
    shutil.copytree(here / "runs/trunk/checkpoints/step-00000006", newer)
    assert branch("later", "trunk", more, verb="command") == Exit.DONE
    assert (known := run.history().parent) is not None and known.step == 6, "the same command goes on with the same"
    assert tplaunch(["command", "tiny.yaml", "--set", "name=later", "--set", more]) == Exit.DONE
    assert (found := goes_on_from(run, "auto")) is not None
    assert found[0] == here / "runs/trunk/checkpoints/step-00000006", "without --from the run remembers it"
    path = str(here / "runs/trunk/checkpoints/step-00000002")
    assert branch("later", path, more, verb="command") == Exit.DONE
    assert (known := run.history().parent) is not None and known.step == 2, "nothing was trained yet"


def test_a_step_of_a_run_is_named_alike_everywhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = Path("runs/trunk/checkpoints")
    assert find_checkpoints("trunk@4") == find_checkpoints(Path("runs/trunk@4")) == [saved / "step-00000004"]
    assert find_checkpoints("runs/trunk/checkpoints@2") == [saved / "step-00000002"]
    assert find_checkpoints("trunk") == [saved / f"step-0000000{step}" for step in (2, 4, 6)]
    shutil.copytree("runs/trunk", "runs/trunk@4")
    assert find_checkpoints("runs/trunk@4")[-1] == Path("runs/trunk@4/checkpoints/step-00000006"), (
        "a folder of that name"
    )
    for name in ("trunk@5", "trunk@best", "trunk@", "nothing@4"):
        with pytest.raises(TplaunchError) as refused:
            find_checkpoints(name)
        assert ("2, 4, 6" in str(refused.value)) == (name == "trunk@5")
    assert tplaunch(["checkpoint", "inspect", "trunk@2"]) == Exit.DONE
    assert "step-00000002" in capsys.readouterr().out
    line = ["command", "tiny.yaml", "--set", "name=warm", "--set", "checkpoint.initial=trunk@2"]
    assert tplaunch(line) == Exit.DONE
    assert load_recipe("runs/warm/recipe.yaml").recipe.checkpoint.initial == str(here / saved / "step-00000002")
    assert tplaunch(line) == Exit.DONE, "the run that is there took the same"
    assert tplaunch([*line[:-1], "checkpoint.initial=trunk@3"]) == Exit.USAGE
    assert f"checkpoint.initial: no checkpoint of step 3 in {here}/runs/trunk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parent", "settings", "words"),
    [
        ("trunk@5", [], ["--from: no checkpoint of step 5 in runs/trunk", "a step that is there: 2, 4, 6"]),
        ("trank@4", [], ["--from: no checkpoint in trank"]),
        ("trunk@4", ["model.num_layers=2"], ["model.num_layers: is 2, was 1", "trunk@4 is of another model"]),
        ("trunk@4", ["optimizer.name=muon"], ["optimizer.name: ", "to go on with"]),
        ("trunk@4", ["training.steps=4"], ["training.steps: the run ends with step 4", "--set training.steps=8"]),
        ("trunk@4", ["checkpoint.initial=runs/trunk"], ["checkpoint.initial: is said beside --from"]),
        ("trunk@4", ["training.seed=5"], ["training.seed: is 5, was 1234", "or go on: --allow-change training.seed"]),
        ("trunk@4", ["training.seq_len=8"], ["training.seq_len: is 8, was 16 in the checkpoint of step 4"]),
        ("trunk@4", ["data.train=tiny.yaml"], ["data.train: "]),
        ("trunk@4", ["name=trunk"], ["--from: runs/trunk holds another run already", "--set name=NAME"]),
    ],
)
def test_what_cannot_branch_is_said_before(
    here: Path, parent: str, settings: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if "data.train=tiny.yaml" in settings:
        (here / "other.txt").write_text("Whether it is nobler in the mind to suffer.\n" * 200)
        settings = ["data.train=other.txt"]
    before = sorted((here / "runs").rglob("*"))
    assert branch("wrong", parent, *settings, verb="command") == Exit.USAGE
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert sorted((here / "runs").rglob("*")) == before


def test_a_damaged_checkpoint_is_refused_and_passed_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = here / "runs/trunk/checkpoints/step-00000006"
    (part,) = newest.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-9])
    assert branch("torn", "trunk@6", "training.steps=9", verb="command") == Exit.USAGE
    said = capsys.readouterr().err
    assert "--from: " in said and "bytes instead of" in said and "--from RUN@STEP" in said
    assert branch("torn", "trunk", "training.steps=9", verb="command") == Exit.DONE
    assert (known := RunDir(here / "runs/torn").history().parent) is not None and known.step == 4
    (here / "runs/trunk/checkpoints/step-00000004/manifest.json").write_text("{")
    assert branch("torn", "trunk@4", "training.steps=9", verb="command") == Exit.USAGE
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_adapters_alone_are_nothing_to_branch_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "runs/trunk/checkpoints/step-00000004"
    manifest = read_manifest(path)
    (path / "manifest.json").write_text(
        type(manifest)(manifest.step, manifest.state, {**manifest.about, "lora": {"rank": 4}}, manifest.files).to_json()
    )
    assert branch("whole", "trunk@4", verb="command") == Exit.USAGE
    assert "holds adapters alone" in (said := capsys.readouterr().err) and "tplaunch export --merge" in said


def test_adapters_branch_above_the_model_beneath_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beneath = ("checkpoint.initial=trunk@6", "finetune.lora={rank: 2}", "training.steps=4")
    words = [word for setting in ("name=tuned", *beneath) for word in ("--set", setting)]
    assert tplaunch(["train", "tiny.yaml", *words]) == Exit.DONE
    assert branch("retuned", "tuned@2", *beneath) == Exit.DONE
    tuned, retuned = losses("tuned"), losses("retuned")
    assert sorted(retuned) == [3, 4] and all(retuned[step] == tuned[step] for step in retuned)
    capsys.readouterr()
    assert branch("other", "tuned@2", "checkpoint.initial=trunk@4", *beneath[1:], verb="command") == Exit.USAGE
    assert "has other weights than those that the adapters were trained on" in capsys.readouterr().err


def test_one_place_to_go_on_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch("two", "trunk@4", verb="command", more=("--resume", "none")) == Exit.USAGE
    assert "--from: does not go with --resume none" in capsys.readouterr().err
    assert branch("one", "trunk@4", verb="command") == Exit.DONE
    assert tplaunch(["command", "tiny.yaml", "--set", "name=one", "--resume", "none"]) == Exit.USAGE
    assert "holds a run already" in capsys.readouterr().err, "it would be no branch any more"
    shutil.copytree("runs/trunk/checkpoints", "runs/one/checkpoints", dirs_exist_ok=True)
    assert branch("one", "trunk@4", verb="command") == Exit.DONE
    assert branch("one", "trunk@2", verb="command") == Exit.USAGE
    assert "runs/one holds another run already" in (said := capsys.readouterr().err) and "from trunk@4" in said


def test_a_sweep_of_cooldowns_from_one_trunk(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each member's run directory remembers the trunk: a job, and its requeues, start from there."""
    words = ["--from", "trunk@4", "--set", "name=cool", "--set", "lr_schedule.decay=wsd"]
    line = ["submit", "tiny.yaml", *words, "--sweep", "lr_schedule.decay_steps=1,2", "--dry-run"]
    before = sorted(here.rglob("*"))
    assert tplaunch(line) == Exit.DONE
    assert "RUN_DIRS=(" in (script := capsys.readouterr().out) and script.count("decay_steps-") == 2
    assert sorted(here.rglob("*")) == before
    settings = ["name=cool", "lr_schedule.decay=wsd"]
    sent = plan_submission("tiny.yaml", settings, sweep=["lr_schedule.decay_steps=1,2"], parent="trunk@4")
    assert script == sent.script() and sent.parents == [here / "runs/trunk"]
    for member in sent.members:
        ready = prepare_run(member)
        assert ready.changes["lr_schedule.decay"] == ("constant", "wsd")
        assert (found := goes_on_from(member.run_dir, "auto")) is not None
        assert found[0] == here / "runs/trunk/checkpoints/step-00000004"
        again = prepare_run(member)  # by hand, and by scripts that tplaunch did not write, before it has saved
        assert again.branch == ready.branch and len([*read_lines(member.run_dir.events)]) == 3, "it branches once"
    with pytest.raises(RecipeError, match="no checkpoint of step 3"):
        plan_submission("tiny.yaml", ["name=cold"], parent="trunk@3")


def test_the_tree_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch("cool-a", "trunk@4", *DECAYED, verb="command") == Exit.DONE
    shutil.copytree("runs/trunk/checkpoints/step-00000006", "runs/cool-a/checkpoints/step-00000006")
    record = {"step": 5, "time": 1.0, "loss": 5.5, "tokens": 160}
    Path("runs/cool-a/metrics.jsonl").write_text("".join(json.dumps({**record, "step": n}) + "\n" for n in (5, 6)))
    assert branch("deeper", "cool-a@6", "training.steps=9", *DECAYED, verb="command") == Exit.DONE
    assert branch("cool-b", "trunk@2", *DECAYED, verb="command") == Exit.DONE
    capsys.readouterr()

    assert tplaunch(["runs", "list", "--sort", "-step"]) == Exit.DONE
    heading, *lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert heading == ["run", "from"]
    assert ["cool-a", "trunk@4"] in lines and ["deeper", "cool-a@6"] in lines and ["cool-b", "trunk@2"] in lines
    assert tplaunch(["runs", "list", "--filter", "parent_step=4", "--json"]) == Exit.DONE
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["parent"], listed["parent_step"]) == ("cool-a", str(here / "runs/trunk"), 4)

    assert tplaunch(["runs", "show", "deeper"]) == Exit.DONE
    text = capsys.readouterr().out
    assert "branch of   runs/cool-a, step 6" in text
    _, _, *tree = text.partition("Branches")[2].partition("\n\n")[0].splitlines()
    assert [line[:10].rstrip() for line in tree] == ["trunk", "  cool-b", "  cool-a", "    deeper"]
    assert tplaunch(["runs", "show", "deeper", "--json"]) == Exit.DONE
    told = json.loads(capsys.readouterr().out)
    assert {mark["step"] for mark in told["events"]} == {6}, "nothing of it is before that"
    assert told["parent_step"] == 6 and [one["depth"] for one in told["family"]] == [0, 1, 1, 2]

    drawn = Curves.of(RunDir(here / "runs/deeper")).line("loss")
    own = [record["step"] for record in RunDir(Path("runs/trunk")).read_metrics()][:4]
    assert [step for step, _ in drawn] == [*own, 5, 6] and drawn[-1] == (6, 5.5)
    assert tplaunch(["runs", "report", "deeper", "-o", "report.html"]) == Exit.DONE
    html = Path("report.html").read_text()
    assert "<h2>Branches</h2><ul><li>trunk" in html and "<b>deeper</b>" in html
    assert html.count("<ul>") == html.count("</ul>") and html.count("<li>") == html.count("</li>")


def test_an_event_says_where_it_began(here: Path) -> None:
    assert branch("told", "trunk@2", verb="command") == Exit.DONE
    (event,) = [one for one in read_lines(here / "runs/told/events.jsonl") if one["event"] == "branch"]
    assert event["step"] == 2 and event["parent"] == str(here / "runs/trunk")
    assert event["path"] == str(here / "runs/trunk/checkpoints/step-00000002")
