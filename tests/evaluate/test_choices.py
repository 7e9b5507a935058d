"""Answers are those that transformers' log-likelihoods give, by lm-eval's conventions; mistakes are named by line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.evaluate.questions import records, right_shares, write_records
from tests.evaluate.test_text import losses_of_transformers, write_folder
from tests.families import VOCAB
from tests.recipes import work_in
from tplaunch.cli.main import run
from tplaunch.data.begin import with_begin
from tplaunch.data.pairs import Words
from tplaunch.data.questions import Asked, Question, read_questions
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import Exit, TplaunchError
from tplaunch.evaluate.choices import summarize

LIMIT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that begins texts with nothing, and one with begin-of-sequence."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name in ("plain", "begin"):
        (root / name).mkdir()
        found[name] = root / name / "tokenizer.json"
        train_bpe(["to be or not to be, that is the question: "], VOCAB, found[name])
    begun = with_begin(found["plain"], True)
    found["begin"].write_text(begun.json)
    return found


def theirs_pair(tokenizer: Any, prefix: int, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-eval 0.4.13, `TemplateLM.loglikelihood`, written down again with transformers' tokenizer."""
    if context == "":
        after = tokenizer.encode(continuation, add_special_tokens=False)
        return ([prefix], after) if after[0] != prefix else (after[:1], after[1:])
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation

    def encode(text: str) -> list[int]:
        bare = text.startswith(tokenizer.decode(prefix))
        return list(tokenizer.encode(text, **({"add_special_tokens": False} if bare else {})))

    whole, before = encode(context + continuation), encode(context)
    return before, whole[len(before) :]


@pytest.mark.parametrize("kind", ["plain", "begin"])
@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("to be", " or not"),
        ("to be  ", "or not"),
        ("", "to be"),
        ("<|endoftext|>to be", " that"),
        ("", "<|endoftext|>to be"),
        ("question:\n", " caf\u00e9"),
        ("to be or not to be " * 12, " that is the question"),
    ],
)
def test_rows_are_those_of_lm_eval(tokenizers: dict[str, Path], kind: str, context: str, continuation: str) -> None:
    path = tokenizers[kind]
    words = Words(Tokenizer(path), path, LIMIT)
    hf = AutoTokenizer.from_pretrained(path.parent)
    before, after = theirs_pair(hf, words.prefix, context, continuation)
    pair = words.pair(context, continuation)
    assert pair.tokens == (before + after)[-(LIMIT + 1) :]
    assert pair.tokens[pair.first :] == after
    assert pair.cut == max(0, len(before) + len(after) - LIMIT - 1)


def test_what_stands_before_a_text_is_what_the_folder_names(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizers["plain"].read_bytes())
    assert Words(Tokenizer(path), path, LIMIT).prefix == Tokenizer(path).eod
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "a"}))
    assert Words(Tokenizer(path), path, LIMIT).prefix == Tokenizer(path).token_id("a")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 30])
def test_rolling_rows_score_each_token_once_with_all_context(tokenizers: dict[str, Path], length: int) -> None:
    path = tokenizers["plain"]
    words = Words(Tokenizer(path), path, 8)
    text = ("jk" * 15)[:length]
    tokens, rows = words.encode(text), list(words.rolling(text))
    assert [token for row in rows for token in row.tokens[row.first :]] == tokens and len(tokens) == length
    assert all(len(row.tokens) == 9 for row in rows[:-1])
    assert all(len(row.tokens) == min(9, length + 1) for row in rows[-1:])
    assert all(row.tokens[0] == words.prefix for row in rows[:1])


def test_the_greatest_wins_and_of_equal_ones_the_first() -> None:
    questions = [Question("a", ("xx", "\u00e9\u00e9\u00e9", "y"), answer) for answer in (0, 1, 2)]
    asked = Asked(questions, [], [])
    found = summarize(asked, [-4.0, -4.0, -9.0, -6.0, -9.3, -2.9, -1.0, -1.0, -1.0])
    assert (found.acc, found.acc_norm, found.acc_bytes) == (1 / 3, 0.0, pytest.approx(1 / 3))
    assert found.acc_stderr == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 2))
    assert summarize(Asked(questions[:1], [], []), [-1.0, -2.0, -3.0]).acc_stderr is None


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Answers by their number, and by their text."""
    work_in(tmp_path, monkeypatch, "")
    gold = [*records(12, "query")[:6], *records(12, "question")[6:]]
    rows = [{**row, "answer": row["choices"][row["answer"]]} if "question" in row else row for row in gold]
    write_records(tmp_path / "q.jsonl", rows)
    assert run(["eval", str(folder), "--choices", "q.jsonl", "--pp", "2", "--json"]) == Exit.DONE
    (found,) = json.loads(capfd.readouterr().out)
    hf = AutoTokenizer.from_pretrained(folder)
    prefix, likelihoods = hf.convert_tokens_to_ids("<|endoftext|>"), []
    for row in rows:
        some = []
        for choice in row["choices"]:
            before, after = theirs_pair(hf, prefix, row.get("query") or row["question"], f" {choice}")
            losses = losses_of_transformers([*before, *after], window=10**6)
            some.append(-math.fsum(losses[len(before) - 1 :]))
        likelihoods.append(some)
    assert {key: found[key] for key in ("acc", "acc_norm", "acc_bytes")} == right_shares(gold, likelihoods)
    assert (found["questions"], found["cut"], found["kind"]) == (12, 0, "choices")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is not JSON"),
        ("[]", "it is a list"),
        ('{"choices": ["a", "b"], "answer": 0}', "no text `query` or `question`"),
        ('{"query": "q", "choices": ["a"], "answer": 0}', "two texts or more"),
        ('{"query": "q", "choices": ["a", " "], "answer": 0}', "choice 1 is empty"),
        ('{"query": "q", "choices": ["a", 3], "answer": 0}', "two texts or more"),
        ('{"query": "q", "choices": ["a", "b"], "answer": 2}', "from 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "answer": true}', "from 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "answer": "c"}', "the text of a choice"),
        ('{"query": "q", "choices": ["a", "b"]}', "from 0 to 1"),
    ],
)
def test_what_is_no_question_is_named_by_its_line(tmp_path: Path, line: str, said: str) -> None:
    good = json.dumps({"query": "q", "choices": ["a", "b"], "gold": 1})
    (tmp_path / "q.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(TplaunchError) as caught:
        read_questions(tmp_path / "q.jsonl")
    assert said in str(caught.value) and "q.jsonl:3" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, [], "cannot read the questions"),
        (b"\n", [], "has no question"),
        (b"\xff", [], "not UTF-8"),
        (b'{"query": "q", "choices": ["a", "bbbbbbbbbbbb"], "answer": 0}', ["--seq-len", "4"], "a choice has as many"),
    ],
)
def test_what_cannot_be_is_said_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    more: list[str],
    said: str,
) -> None:
    work_in(tmp_path, monkeypatch, "")
    if content is not None:
        (tmp_path / "q.jsonl").write_bytes(content)
    monkeypatch.delattr("tplaunch.evaluate.run.run_module")  # no process may start
    assert run(["eval", str(folder), "--choices", "q.jsonl", *more]) == Exit.USAGE
    assert said in capsys.readouterr().err


def test_a_question_that_loses_its_beginning_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work_in(tmp_path, monkeypatch, "")
    write_records(tmp_path / "q.jsonl", [{"query": "q" * 30, "choices": ["a", "bb"], "answer": 0}])
    monkeypatch.setattr("tplaunch.evaluate.run.run_module", lambda *_, **__: [[3.0, False], [4.0, False]])
    assert run(["eval", str(folder), "--choices", "q.jsonl", "--seq-len", "16"]) == Exit.DONE
    said = capsys.readouterr()
    assert "of 2 of 2 choices the question's beginning is left out" in said.err and "1.0000" in said.out
