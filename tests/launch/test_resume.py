"""What may change between two launches of a run: each change refused, allowed, or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import copied
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit
from tplaunch.files import read_lines
from tplaunch.launch.resume import data_changes
from tplaunch.run.directory import RunDir

RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 1, num_heads: 4, ffn_hidden_size: 64, vocab_size: 400}
topology: {dp: 1}
training: {seq_len: 16, global_batch_size: 2, steps: 2, precision: fp32}
optimizer: {lr: 1.0e-3}
data: {train: text.jsonl, validation: held.txt, tokenizer: {vocab_size: 300}}
logging: {every: 1, wandb: {mode: disabled}}
"""
LINES = [json.dumps({"text": f"To be, or not to be, that is question number {n}."}) for n in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps and everything that it was made from."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "text.jsonl").write_text("\n".join(LINES))
    (folder / "other.jsonl").write_text("\n".join(reversed(LINES)))
    (folder / "held.txt").write_text("Whether it is nobler in the mind to suffer.\n" * 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
        assert tplaunch(["train", "tiny.yaml"]) == Exit.DONE
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change."""
    return copied(trained, tmp_path / "copy", monkeypatch)


def go_on(*settings: str, allow: str = "") -> int:
    """The exit code of making the run's next launch ready: everything but the ranks."""
    sets = [word for setting in ("training.steps=4", *settings) for word in ("--set", setting)]
    return tplaunch(["command", "tiny.yaml", *sets, *(["--allow-change", allow] if allow else [])])


def changed(here: Path) -> dict[str, Any]:
    events = [event for event in read_lines(here / "runs/tiny/events.jsonl") if event["event"] == "changed"]
    return events[-1] if events else {}


def test_a_checkpoint_keeps_the_tokenizer_and_what_its_data_are(here: Path) -> None:
    (checkpoint,) = (here / "runs/tiny/checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert "tokenizer.json" in manifest["files"] and manifest["about"]["seed"] == 1234
    (corpus,) = manifest["about"]["data"]["train"]
    assert corpus["documents"] == 200 and len(corpus["sha256"]) == 64
    assert manifest["state"]["progress"]["samples"] == 4
    assert (checkpoint / "tokenizer.json").read_bytes() == (here / "runs/tiny/tokenizer.json").read_bytes()


def append_lines(here: Path) -> list[str]:
    with (here / "text.jsonl").open("a") as file:
        file.write("\n" + "\n".join(json.dumps({"text": f"Zounds and xylophones {n}"}) for n in range(50)))
    return []


def replace_by_longer(here: Path) -> list[str]:
    (here / "text.jsonl").write_text("\n".join(LINES * 3))
    return []


def edit_in_place(here: Path) -> list[str]:
    (here / "text.jsonl").write_text("\n".join(LINES).replace("question", "guestion"))
    return []


def another_list(here: Path) -> list[str]:
    return ["data.train=[{path: text.jsonl}, {path: other.jsonl}]"]


def another_tokenizer(here: Path) -> list[str]:
    tokenizer = json.loads((here / "runs/tiny/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (here / "mine.json").write_text(json.dumps(tokenizer))
    return [f"data.tokenizer={here / 'mine.json'}"]


def another_seed(here: Path) -> list[str]:
    return ["training.seed=7"]


def another_length(here: Path) -> list[str]:
    return ["training.seq_len=8"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (append_lines, "data.train"),
        (replace_by_longer, "data.train"),
        (edit_in_place, "data.train"),
        (another_list, "data.train"),
        (another_tokenizer, "data.tokenizer"),
        (another_seed, "training.seed"),
        (another_length, "training.seq_len"),
    ],
)
def test_what_would_spoil_a_run_is_refused_unless_allowed(
    here: Path, capsys: pytest.CaptureFixture[str], change: Any, key: str
) -> None:
    settings = change(here)
    before = (here / "runs/tiny/recipe.yaml").read_bytes()
    tokenizer = (here / "runs/tiny/tokenizer.json").read_bytes()
    assert go_on(*settings) == Exit.USAGE
    err = capsys.readouterr().err
    assert f"{key}: is " in err and "in the checkpoint of step 2" in err and f"--allow-change {key}" in err
    assert (here / "runs/tiny/recipe.yaml").read_bytes() == before
    assert go_on(*settings, allow=key.partition(".")[0]) == Exit.DONE
    assert f"changed: {key}: " in capsys.readouterr().err
    event = changed(here)
    assert key in event["changes"] and event["allowed"] == [key.partition(".")[0]]
    if key != "data.tokenizer":
        assert (here / "runs/tiny/tokenizer.json").read_bytes() == tokenizer, "it was trained again"


@pytest.mark.slow
def test_weights_of_a_mixture_are_part_of_the_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = "data.train=[{{path: text.jsonl, weight: {}}}, {{path: other.jsonl}}]"
    run = ["train", "tiny.yaml", "--run-dir", "mixed", "--set"]
    assert tplaunch([*run, mixture.format(1)]) == Exit.DONE
    more = ["--set", "training.steps=3"]
    assert tplaunch([*run, mixture.format(3), *more]) == Exit.USAGE
    assert "weight 3" in (err := capsys.readouterr().err) and "weight 1" in err
    assert tplaunch([*run, mixture.format(1), *more]) == Exit.DONE


def test_a_mixture_of_an_older_version_does_not_go_on_with_other_samples() -> None:
    one, other = ({"weight": 1.0, "documents": n, "tokens": 99, "sha256": f"{n}" * 64} for n in (1, 2))
    old: dict[str, Any] = {"train": [one, other], "validation": [], "tokenizer": None}
    new = old | {"order": 2}
    assert [*data_changes(old, new)] == ["data.train"]
    assert "order" in data_changes(old, new)["data.train"][1]
    assert data_changes(new, new) == {}
    assert data_changes(old | {"train": [one]}, new | {"train": [one]}) == {}  # one corpus is read as ever


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [((6, 2), (3, 1), True), ((1, 1), (0.5, 0.5), True), ((5,), (1,), True), ((6, 2), (3, 2), False)],
)
def test_equal_shares_are_no_change(was: tuple[float, ...], now: tuple[float, ...], same: bool) -> None:
    def facts(weights: tuple[float, ...], documents: int = 7) -> dict[str, Any]:
        corpora = [
            {"weight": weight, "documents": documents + n, "tokens": 99, "sha256": f"{n}" * 64}
            for n, weight in enumerate(weights)
        ]
        return {"train": corpora, "validation": corpora, "tokenizer": None, "order": 3}

    assert [*data_changes(facts(was), facts(now))] == ([] if same else ["data.train", "data.validation"])
    if same:  # what else differs is said without them
        _, new = data_changes(facts(was), facts(now, documents=8))["data.train"]
        assert "8 documents" in new and f"weight {now[0]:g}" not in new


def test_what_may_change_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "held.txt").write_text("To sleep, perchance to dream.\n" * 50)
    assert go_on("optimizer.lr=5e-4", "training.global_batch_size=4", "training.precision=fp64") == Exit.DONE
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed: ")]
    told = {line.split(": ")[1]: line.split(": ", 2)[2] for line in lines}
    assert told["optimizer.lr"] == "0.001 -> 0.0005"
    assert told["training.steps"] == "2 -> 4" and told["training.precision"] == "fp32 -> fp64"
    assert told.keys() == {
        *("optimizer.lr", "training.steps", "training.global_batch_size", "training.precision", "data.validation")
    }
    assert changed(here)["changes"]["training.global_batch_size"] == [2, 4]


def test_a_schedule_in_other_words_goes_on_without_a_word_and_another_past_does_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["training.tokens=64", "lr_schedule.pieces=[{kind: cosine, for: 64 tokens}]"]
    sets = [word for setting in same for word in ("--set", setting)]
    assert tplaunch(["command", "tiny.yaml", *sets]) == Exit.DONE
    assert "changed: " not in capsys.readouterr().err and changed(here) == {}
    cooled = "lr_schedule.pieces=[{kind: cosine, for: 2}, {kind: constant}]"
    assert go_on(cooled) == Exit.DONE
    assert "changed: lr_schedule.pieces: " in capsys.readouterr().err
    assert "lr_schedule.pieces" in changed(here)["changes"]
    assert go_on("lr_schedule.pieces=[{kind: constant}]") == Exit.USAGE
    err = capsys.readouterr().err
    assert "lr_schedule.pieces: gives step 1 the learning rate 0.001; it was trained with 0.0005" in err
    assert go_on("lr_schedule.pieces=[{kind: constant}]", allow="lr_schedule") == Exit.DONE


def test_an_unchanged_run_goes_on_without_a_word(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["command", "tiny.yaml"]) == Exit.DONE
    assert "changed: " not in capsys.readouterr().err
    assert changed(here) == {}


def test_a_lost_cache_and_a_moved_run_change_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.rmtree(here / "cache")
    (here / "runs/tiny").rename(here / "moved")
    moved = ["--run-dir", "moved", "--set", "training.steps=3"]
    assert tplaunch(["train", "tiny.yaml", *moved]) == Exit.DONE
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed: data")] == []
    assert RunDir(here / "moved").history().steps_done == 3


def test_a_run_of_the_version_before_is_compared_by_what_it_left(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints know neither data nor tokenizer; its recipe names the files."""
    from tplaunch.checkpoint.store import MANIFEST, Manifest, read_manifest

    (checkpoint,) = (here / "runs/tiny/checkpoints").iterdir()
    manifest = read_manifest(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "tokenizer.json"}
    about = {key: value for key, value in manifest.about.items() if key not in ("data", "seed")}
    progress = {k: v for k, v in manifest.state["progress"].items() if k != "samples"}
    old = Manifest(manifest.step, {**manifest.state, "progress": progress}, about, files)
    (checkpoint / MANIFEST).write_text(old.to_json())
    assert go_on("training.seed=7") == Exit.USAGE
    append_lines(here)
    assert go_on() == Exit.USAGE
    assert "data.train: is 250 documents" in capsys.readouterr().err
    (here / "text.jsonl").write_text("\n".join(LINES))
    assert tplaunch(["train", "tiny.yaml", "--set", "training.steps=3"]) == Exit.DONE
