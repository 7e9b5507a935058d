"""The loss of a text is that of transformers, on every topology; what is measured is kept, and mistakes come before."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.families import MODELS, VOCAB, reference
from tests.made_runs import make_run
from tests.recipes import work_in
from tests.world import World
from tplaunch.checkpoint.origin import origin_of
from tplaunch.cli.main import run
from tplaunch.data.build import build
from tplaunch.data.indexed import IndexedTokens, IndexedWriter
from tplaunch.data.tokenizer import train_bpe
from tplaunch.errors import Exit
from tplaunch.evaluate.rows import Given, Windows, passes
from tplaunch.evaluate.run import check
from tplaunch.report.facts import RunFacts
from tplaunch.report.page import page

WINDOW = 40
LINES = [
    "Whether 'tis nobler in the mind to suffer",
    "the slings and arrows of outrageous fortune,",
    "",
    "na\u00efve \u2014 caf\u00e9",
] * 9


def write_folder(folder: Path, family: str = "llama") -> Path:
    """A Hugging Face folder of a family's reference, with a tokenizer."""
    reference(family).save_pretrained(folder)
    train_bpe(["to be or not to be, that is the question: "], VOCAB, folder / "tokenizer.json")
    return folder


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]]) -> None:
    """Token files."""
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for document in documents:
        writer.add(np.array(document))
        writer.end_document()
    writer.compose()
    writer.commit()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("ours")
    assert run(["import", str(folder), str(out)]) == Exit.DONE
    return out / "step-00000000"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A prefix of token files of `LINES`, each a document."""
    place = tmp_path_factory.mktemp("data")
    (place / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    build([place / "lines.jsonl"], place / "lines", folder / "tokenizer.json", progress=False)
    return place / "lines"


@torch.no_grad()
def losses_of_transformers(tokens: list[int], family: str = "llama", window: int = WINDOW) -> list[float]:
    """Of each token but the first, window by window, in fp64 from fp32 logits."""
    model, found = reference(family), []
    for begin in range(0, len(tokens) - 1, window):
        row = torch.tensor([tokens[begin : begin + window + 1]])
        logits = model(row[:, :-1]).logits[0]
        found += F.cross_entropy(logits.double(), row[0, 1:], reduction="none").tolist()
    return found


def _score(checkpoint: str, corpus: str, tp: int, pp: int, dp: int) -> list[tuple[float, bool]]:
    from tplaunch.evaluate.score import score
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = check(origin_of(Path(checkpoint)), tp, pp, dp).recipe
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint))
    return score(model, Windows(IndexedTokens.open(corpus), WINDOW))


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)])
def test_losses_are_those_of_transformers(
    world: World, checkpoint: Path, corpus: Path, tp: int, pp: int, dp: int
) -> None:
    results = world.run(tp * pp * dp, _score, str(checkpoint), str(corpus), tp, pp, dp)
    theirs = losses_of_transformers(IndexedTokens.open(corpus).tokens.tolist())
    sums = [math.fsum(theirs[begin : begin + WINDOW]) for begin in range(0, len(theirs), WINDOW)]
    assert len(theirs) % WINDOW, "the last window is shorter"
    for result in results:
        assert [loss for loss, _ in result] == pytest.approx(sums, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "dp"),
    [("gemma2", 1), ("gpt2", 1), ("granite", 1), ("qwen3_moe", 2), ("deepseek_v3", 1), ("smollm3-window", 1)],
)
def test_losses_of_families(world: World, tmp_path: Path, corpus: Path, family: str, dp: int) -> None:
    """With caps, divisors, learned positions, experts and layers that turn nothing; on two ranks that share layers."""
    folder = write_folder(tmp_path / "theirs", family)
    assert run(["import", str(folder), str(tmp_path / "ours")]) == Exit.DONE
    found, *_ = world.run(2 * dp, _score, str(tmp_path / "ours/step-00000000"), str(corpus), 2, 1, dp)
    theirs = losses_of_transformers(IndexedTokens.open(corpus).tokens.tolist(), family)
    sums = [math.fsum(theirs[begin : begin + WINDOW]) for begin in range(0, len(theirs), WINDOW)]
    assert [loss for loss, _ in found] == pytest.approx(sums, rel=1e-6)


def _likeliest(checkpoint: str, rows: list[tuple[list[int], int]], tp: int) -> list[tuple[float, bool]]:
    from tplaunch.evaluate.score import score
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = check(origin_of(Path(checkpoint)), tp).recipe
    return score(load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint)), Given(rows))


@pytest.mark.parametrize("tp", [1, 2])
def test_only_what_is_asked_is_scored_and_the_likeliest_is_known(world: World, checkpoint: Path, tp: int) -> None:
    """Of rows of other lengths in one pass."""
    prompt = [5, 77, 130]
    made = (
        reference("llama")
        .generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0]
        .tolist()
    )
    other = [*made[:-1], (made[-1] + 1) % VOCAB]
    rows = [(made, 3), (other, 3), (other[:-1], 3), ([9, 8], 1)]
    for found in world.run(tp, _likeliest, str(checkpoint), rows, tp):
        for (tokens, first), (loss, _) in zip(rows, found, strict=True):
            assert loss == pytest.approx(math.fsum(losses_of_transformers(tokens)[first - 1 :]), rel=1e-6)
        assert [likeliest for _, likeliest in found[:3]] == [True, False, True]


def _documents(checkpoint: str, prefix: str, tp: int) -> list[tuple[float, bool]]:
    from tplaunch.evaluate.score import score
    from tplaunch.generate.load import load_model
    from tplaunch.parallel.mesh import Mesh

    recipe = check(replace(origin_of(Path(checkpoint)), document_mask=True), tp).recipe
    model = load_model(recipe, Mesh.of(recipe, torch.device("cpu")), Path(checkpoint))
    return score(model, Windows(IndexedTokens.open(prefix), WINDOW, documents=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_documents_are_told_apart_where_training_did(world: World, tmp_path: Path, checkpoint: Path, tp: int) -> None:
    """A token sees its own document alone, and the one window is padded to the length of the other."""
    documents = [[7 + number, *range(20, 20 + size)] for number, size in enumerate((24, 9, 20, 12))]
    write_corpus(tmp_path / "some", documents)
    flat = [token for one in documents for token in one]
    starts = {sum(map(len, documents[:number])) for number in range(len(documents))}
    expected = []
    for begin in range(0, len(flat) - 1, WINDOW):
        loss = 0.0
        for place in range(begin, min(begin + WINDOW, len(flat) - 1)):  # that is read, and predicts the next
            seen = max({begin, *(start for start in starts if begin <= start <= place)})
            loss += losses_of_transformers(flat[seen : place + 2])[-1]
        expected.append(loss)
    assert len(expected) == 2
    for found in world.run(tp, _documents, str(checkpoint), str(tmp_path / "some"), tp):
        assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-6)


def test_windows_predict_each_token_once() -> None:
    tokens = np.arange(100, 200)
    corpus = IndexedTokens(Path("made"), tokens, np.array([30, 70]), np.array([0, 30 * 8]), np.array([0, 1, 2]))
    rows = Windows(corpus, 33, documents=True)
    found = [rows[number] for number in range(len(rows.lengths))]
    assert [len(row.tokens) for row in found] == rows.lengths == [34, 34, 34]
    assert np.concatenate([row.tokens[row.first :] for row in found]).tolist() == tokens[1:].tolist()
    assert found[0].positions is not None and found[1].positions is not None
    assert found[0].positions[28:].tolist() == [28, 29, 0, 1, 2, 3] and found[1].positions[:2].tolist() == [0, 1]
    assert Windows(corpus, 98).lengths == [99, 2]


def test_passes_hold_rows_of_about_one_length() -> None:
    lengths = [3, 50, 4, 120, 5, 49]
    found = passes(lengths, 100)
    assert found == [[3], [1, 5], [4, 2, 0]]
    assert passes([], 100) == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, "")


def test_the_command_on_a_folder(place: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through torchrun, on two ranks, of raw text: bits by the bytes of that text."""
    (place / "one.txt").write_text(text := "\n".join(LINES))
    arguments = ["eval", str(folder), "--data", "one.txt", "--seq-len", str(WINDOW), "--tp", "2", "--json"]
    assert run(arguments) == Exit.DONE
    (found,) = json.loads(capfd.readouterr().out)
    build([place / "one.txt"], place / "one", folder / "tokenizer.json", progress=False)
    tokens = IndexedTokens.open("one").tokens.tolist()
    theirs = losses_of_transformers(tokens)
    assert found["loss"] == pytest.approx(np.mean(theirs), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(theirs)), rel=1e-5)
    assert found["bytes"] == len(text.encode()) - 1, "less that of the first token, W, which nothing precedes"
    assert found["bits_per_byte"] == pytest.approx(sum(theirs) / math.log(2) / found["bytes"], rel=1e-6)
    assert (found["tokens"], found["window"], found["data"]) == (len(tokens) - 1, WINDOW, "one.txt")


def test_a_run_keeps_what_it_was_found_to_know(
    place: Path, checkpoint: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = make_run(place / "runs/made", records=3)
    (made.root / "tokenizer.json").write_bytes((checkpoint.parent / "tokenizer.json").read_bytes())
    checkpoint.rename(made.checkpoints / checkpoint.name)
    try:
        arguments = ["eval", "runs/made", "--data", str(corpus), "--tokenizer", "runs/made/tokenizer.json"]
        assert run([*arguments, "--seq-len", "16"]) == Exit.DONE
        printed = capfd.readouterr().out
        (kept,) = map(json.loads, (made.root / "evaluations.jsonl").read_text().splitlines())
        assert kept["step"] == 0 and kept["window"] == 16 and f"{kept['bits_per_byte']:.4f}" in printed
        assert run(["runs", "show", "runs/made"]) == Exit.DONE
        shown = capfd.readouterr().out
        assert "Evaluations" in shown and f"{kept['loss']:.4f}" in shown
        assert run(["runs", "show", "runs/made", "--json"]) == Exit.DONE
        assert json.loads(capfd.readouterr().out)["evaluations"] == [kept]
        with (made.root / "evaluations.jsonl").open("a") as file:
            file.write('{"step": "x"}\n{"step": 3, "data": "later", "loss": "high", "acc": true}\n{torn')
        shown = page(RunFacts.of(made))
        assert "<h2>Evaluations" in shown and f"{kept['loss']:.4f}" in shown
        assert "later" in shown and "high" not in shown
    finally:
        (made.checkpoints / checkpoint.name).rename(checkpoint)


def _damage(place: Path, case: str, checkpoint: Path, corpus: Path) -> list[str]:
    """Arguments that cannot work."""
    (place / "text.txt").write_text("to be or not to be")
    target, data = [str(checkpoint)], ["--data", "text.txt"]
    if case == "no text":
        (place / "text.txt").write_text("")
    if case == "one token":
        write_corpus(place / "one", [[7]])
        data = ["--data", "one"]
    if case == "beyond":
        write_corpus(place / "wild", [[7, 8, VOCAB + 9]])
        data = ["--data", "wild"]
    if case == "other tokenizer":
        train_bpe(["something else"], 270, place / "other.json")
        data = ["--data", str(corpus), "--tokenizer", "other.json"]
    if case == "large tokenizer":
        train_bpe([" ".join(map(str, range(4000)))], 400, place / "large.json")
        data = [*data, "--tokenizer", "large.json"]
    return ["eval", *target, *(data if case != "nothing" else [])]


@pytest.mark.parametrize(
    ("case", "more", "said"),
    [
        ("nothing", [], "nothing to measure"),
        ("missing", ["--data", "nowhere.txt"], "no such file"),
        ("missing", ["--data", "nowhere"], "no such file"),
        ("no text", [], "no text"),
        ("one token", [], "nothing is predicted"),
        ("beyond", [], "outside the vocabulary"),
        ("other tokenizer", [], "made with another tokenizer"),
        ("large tokenizer", [], "the model 300"),
        ("heads", ["--tp", "3"], "heads cannot be shared"),
        ("layers", ["--pp", "9"], "layers"),
    ],
)
def test_what_cannot_be_is_said_before(
    place: Path,
    checkpoint: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
    more: list[str],
    said: str,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("no process may start")

    monkeypatch.setattr("tplaunch.evaluate.run.run_module", never)
    assert run([*_damage(place, case, checkpoint, corpus), *more]) == Exit.USAGE
    assert said in capsys.readouterr().err


def test_positions_that_a_model_has_not(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(place / "gpt2", "gpt2")
    limit = MODELS["gpt2"]["max_position"]
    assert run(["eval", str(folder), "--data", "text.txt", "--seq-len", str(limit + 1)]) == Exit.USAGE
    assert "max_position" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_null(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tplaunch.evaluate.run.run_module", lambda *_, **__: [[math.nan, False]])
    (place / "text.txt").write_text("to be or not")
    assert run(["eval", str(checkpoint), "--data", "text.txt", "--json"]) == Exit.DONE
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["loss"] is None and found["perplexity"] is None and found["tokens"] > 0


def test_a_short_text_is_a_warning(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tplaunch.evaluate.run.run_module", lambda *_, **__: [[3.0, False]])
    (place / "text.txt").write_text("to be or not")
    assert run(["eval", str(checkpoint), "--data", "text.txt", "--seq-len", "64"]) == Exit.DONE
    assert "less than one window of 64 + 1" in capsys.readouterr().err
