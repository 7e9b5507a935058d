"""What a run reads of each corpus, said before, while and after it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recipes import SEQ
from tests.train.test_samples import recipe
from tplaunch.cli.main import run
from tplaunch.data import remembered
from tplaunch.data.amounts import amounts, count_tokens, in_words, worn_out
from tplaunch.data.indexed import IndexedTokens, IndexedWriter
from tplaunch.data.tokenizer import train_bpe
from tplaunch.recipe.schema import Recipe

RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 1, num_heads: 4, ffn_hidden_size: 64, vocab_size: 400}
topology: {dp: 1}
training: {seq_len: 16, global_batch_size: 8, steps: 12, precision: fp32}
optimizer: {lr: 1.0e-3}
data: {train: c}
logging: {every: 4, wandb: {mode: disabled}}
"""


def write(prefix: Path, samples: int, seq: int = 16) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    writer.add(np.arange(samples * seq + 1).astype(np.uint16) % 300)
    writer.end_document()
    writer.compose()
    writer.commit()
    return str(prefix)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def parsed(train: Any) -> Recipe:
    return Recipe.model_validate(recipe("x", 12, 8) | {"data": {"train": train}})


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_tokens_are_counted_as_numpy_counts_them(tmp_path: Path, dtype: str) -> None:
    writer = IndexedWriter(tmp_path / "c", np.dtype(dtype))
    writer.add(np.arange(77))
    writer.end_document()
    writer.compose()
    writer.commit()
    assert count_tokens(str(tmp_path / "c")) == len(IndexedTokens.open(tmp_path / "c").tokens) == 77
    assert count_tokens(str(tmp_path / "none")) is None


def test_epochs_follow_from_weights_and_sizes(tmp_path: Path) -> None:
    """12 steps of 8 are 96 samples: 72 of a corpus of 12, 24 of one of 100."""
    train = [{"path": write(tmp_path / "a", 12, SEQ), "weight": 3}, {"path": write(tmp_path / "b", 100, SEQ)}]
    first, second = amounts(parsed(train))
    assert (first.share, first.samples, first.epochs) == (0.75, 12, 6.0)
    assert (second.share, second.samples, second.epochs) == (0.25, 100, 0.24)
    (warning,) = worn_out([first, second])
    assert warning.key == "data.train[0]" and "6.00 epochs" in warning.what and "2305.16264" in warning.why
    assert not [*worn_out(amounts(parsed([{"path": train[1]["path"]}])))]
    assert "share 75 %" in next(in_words([first, second]))


def test_many_corpora_take_few_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a", 12, SEQ)
    lines = [*in_words(amounts(parsed([{"path": path}] * 500)))]
    assert len(lines) < 20 and lines[-1] == "and 490 corpora more"


def test_plan_says_how_often_data_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "c", 12)
    assert run(["plan", "tiny.yaml", "--gpu", "h100-80gb"]) == 0
    out = capsys.readouterr().out
    assert "193 tokens, 8.00 epochs by the end of the run" in out
    assert "warning: data.train: " in out and "is read 8.00 epochs" in out
    assert run(["plan", "tiny.yaml", "--gpu", "h100-80gb", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["tokens"], one["share"], one["epochs"]) for one in told["data"]] == [(193, 1.0, 8.0)]
    assert any("8.00 epochs" in warning for warning in told["warnings"])
    assert run(["plan", "tiny.yaml", "--gpu", "h100-80gb", "--set", "data.train=gone"]) == 0
    assert "gone: not at hand" in capsys.readouterr().out


@pytest.mark.slow
def test_train_says_it_and_records_what_was_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "c", 12)
    write(here / "d", 100)
    mixture = "data.train=[{path: c, weight: 3}, {path: d}]"
    assert run(["train", "tiny.yaml", "--set", mixture, "--set", "training.steps=6"]) == 0
    assert run(["train", "tiny.yaml", "--set", mixture]) == 0
    out, err = capsys.readouterr()
    assert "is read 6.00 epochs by the end of the run" in err
    assert "a further epoch begins with step 3: " in out + err
    events = [json.loads(line) for line in (here / "runs/tiny/events.jsonl").read_text().splitlines()]
    planned = [event for event in events if event["event"] == "data"]
    assert [event["samples"] for event in planned] == [48, 96]
    assert [one["epochs"] for one in planned[-1]["corpora"]] == [6.0, 0.24]
    begun = [(event["step"], one["epoch"]) for event in events if event["event"] == "epoch" for one in event["corpora"]]
    assert begun == [(3, 2), (5, 3), (7, 4), (9, 5), (11, 6)]  # six samples of the corpus of 12 a step
    read = [event for event in events if event["event"] == "data_read"][-1]
    assert (read["step"], read["samples"]) == (12, 96)
    assert [(one["samples"], one["share"], one["share_read"]) for one in read["corpora"]] == [
        (72, 0.75, 0.75),
        (24, 0.25, 0.25),
    ]


@pytest.mark.slow
def test_what_was_read_before_data_changed_is_booked_to_what_gave_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """48 samples of `c` and `d`, then 24 of `d` and `e`, then 12 of `e` alone, in samples of half the length."""
    for name, samples in (("c", 12), ("d", 100), ("e", 200)):
        write(here / name, samples)

    def train(mixture: str, steps: int, *more: str) -> list[tuple[str, int, float]]:
        command = ["train", "tiny.yaml", "--set", f"data.train={mixture}", "--set", f"training.steps={steps}", *more]
        assert run(command) == 0
        events = [json.loads(line) for line in (here / "runs/tiny/events.jsonl").read_text().splitlines()]
        read = [event for event in events if event["event"] == "data_read"][-1]
        assert sum(one["samples"] for one in read["corpora"]) == read["samples"]
        return [(Path(one["path"]).name, one["samples"], one["share"]) for one in read["corpora"]]

    allow = ["--allow-change", "data"]
    assert train("[{path: c, weight: 3}, {path: d}]", 6) == [("c", 36, 0.75), ("d", 12, 0.25)]
    assert train("[{path: d}, {path: e}]", 8, *allow) == [("d", 20, 0.5), ("e", 8, 0.5), ("c", 36, 0.0)]
    assert train("[{path: d}, {path: e}]", 9) == [("d", 24, 0.5), ("e", 12, 0.5), ("c", 36, 0.0)]
    halves = ["--set", "training.seq_len=8", "--allow-change", "training.seq_len", *allow]
    assert train("[e]", 10, *halves) == [("e", 32, 1.0), ("c", 72, 0.0), ("d", 48, 0.0)]
    # Moved, it is the same corpus.
    for end in (".bin", ".idx"):
        (here / f"e{end}").rename(here / f"moved{end}")
    assert train("[moved]", 11, "--set", "training.seq_len=8")[0] == ("moved", 40, 1.0)


def test_a_check_without_data_names_what_it_could_not_look_at(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--set", "data.validation=[{path: held}]", "--set", "training.eval_every=2"]
    assert run(["recipe", "check", "tiny.yaml", *missing]) == 0
    said = capsys.readouterr().out
    first = "tiny: ok, but for what could not be looked at: data.train, data.validation[0].path"
    assert said.splitlines()[0] == first
    write(here / "c", 12)
    assert run(["recipe", "check", "tiny.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "tiny: ok"
    assert run(["recipe", "check", "tiny.yaml", "--json", *missing]) == 0
    assert json.loads(capsys.readouterr().out)["not_looked_at"] == ["data.validation[0].path"]


@pytest.mark.parametrize("tokenizer", ["{vocab_size: 300}", pytest.param("tokenizer.json", marks=pytest.mark.slow)])
def test_plan_counts_text_that_the_cache_has_in_tokens(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    """Text alone, a folder, and a corpus beside them: the same figures as `train` says."""
    monkeypatch.setattr(remembered, "_SETTLED", -1.0)
    (here / "many").mkdir()
    for name in ("a.txt", "many/b.txt", "many/c.jsonl"):
        (here / name).write_text(json.dumps({"text": f"{name}: to be, or not to be " * 99}))
    train_bpe([(here / "a.txt").read_text()], 280, here / "tokenizer.json")
    write(here / "c", 12)
    data = f"data={{train: [{{path: a.txt, weight: 3}}, many, c], tokenizer: {tokenizer}}}"
    command = ["--set", data, "--set", "training.steps=2"]

    def figures(said: str) -> list[str]:
        """Of each corpus, without its path."""
        return [line.split(", share")[1] for line in said.splitlines() if line.startswith("data: ")]

    def planned() -> list[str]:
        assert run(["plan", "tiny.yaml", "--gpu", "h100-80gb", *command]) == 0
        return figures(capsys.readouterr().out)

    def uncounted() -> list[bool]:
        return [line.endswith("text, counted once it is tokenized") for line in planned()]

    assert sorted(uncounted()) == [False, True, True]
    assert run(["train", "tiny.yaml", *command]) == 0
    said = figures(capsys.readouterr().err)
    assert planned() == said and len(said) == 3 and all("epochs by the end" in line for line in said)
    (here / "a.txt").write_text("changed")
    if tokenizer == "tokenizer.json":
        assert sum(uncounted()) == 1
        (here / "tokenizer.json").write_text((here / "tokenizer.json").read_text() + " ")
    assert sum(uncounted()) == 2


def test_counting_takes_no_numpy() -> None:
    program = "import sys, tplaunch.data.amounts; sys.exit(bool({'numpy', 'tokenizers', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)
