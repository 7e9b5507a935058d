"""`tplaunch data` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chats import conversation, write_lines, write_tokenizer
from tplaunch.cli.main import run

PLAY = Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "cache"))


def prepare(tmp_path: Path, *more: str) -> int:
    return run(["data", "prepare", str(PLAY), "--output", str(tmp_path / "out" / "play"), *more])


def test_prepare_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, "--vocab-size", "512") == 0
    said = capsys.readouterr().out
    assert "1 documents" in said
    assert f"tokenizer: {tmp_path}/out/play.tokenizer.json" in said
    assert run(["data", "inspect", str(tmp_path / "out" / "play")]) == 0
    said = capsys.readouterr().out
    assert "JULIUS CAESAR" in said
    assert "uint16" in said
    assert run(["data", "inspect", str(tmp_path / "out" / "play"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 1
    assert report["vocab_size"] == 512
    assert report["largest_token"] == 511
    assert report["sources"] == [PLAY.name]
    assert report["samples"][0]["text"].startswith("JULIUS CAESAR")
    assert report["samples"][0]["tokens"] == report["tokens"]


def test_prepare_with_a_given_tokenizer_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, "--vocab-size", "300", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    tokenizer = str(tmp_path / "out" / "play.tokenizer.json")
    again = ["data", "prepare", str(PLAY), "-o", str(tmp_path / "second"), "--tokenizer", tokenizer, "--json"]
    assert run(again) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_data_of_other_makers_is_shown_in_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, "--vocab-size", "300") == 0
    for ending in ("tokenizer.json", "meta.json"):
        (tmp_path / "out" / f"play.{ending}").unlink()
    capsys.readouterr()
    assert run(["data", "inspect", str(tmp_path / "out" / "play"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokenizer"] is None
    assert all(int(token) < 300 for token in report["samples"][0]["text"].split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give either --tokenizer FILE or --vocab-size N"),
        (["--vocab-size", "300", "--tokenizer", "t.json"], "give either --tokenizer FILE or --vocab-size N"),
        (["--vocab-size", "100"], "--vocab-size"),
        (["--tokenizer", "no-such.json"], "no-such.json: cannot read the tokenizer"),
    ],
)
def test_mistakes_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert prepare(tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "play.idx").exists()


def test_damage_ends_with_2_and_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, "--vocab-size", "300") == 0
    with (tmp_path / "out" / "play.bin").open("ab") as file:
        file.write(b"x")
    capsys.readouterr()
    assert run(["data", "inspect", str(tmp_path / "out" / "play")]) == 2
    assert f"{tmp_path}/out/play.bin: byte " in capsys.readouterr().err


def test_the_command_starts_without_what_it_does_not_need() -> None:
    heavy = {"numpy", "torch", "tokenizers", "wandb"}
    program = f"import sys, tplaunch.cli.data; print({heavy!r} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"
    program = "import sys, tplaunch.data.prepare, tplaunch.data.dataset; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_a_list_keeps_its_order_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} text of its own, some words long\n" * 50)
    (tmp_path / "list").write_text(f"{tmp_path}/b.txt\n{tmp_path}/a.txt\n")
    output = str(tmp_path / "c")
    assert run(["data", "prepare", "--files-from", str(tmp_path / "list"), "-o", output, "--vocab-size", "300"]) == 0
    assert f"{tmp_path}/list: 2 files in the order of the list" in capsys.readouterr().err
    assert run(["data", "inspect", output]) == 0
    shown = capsys.readouterr().out
    assert shown.index("b text") < shown.index("a text")


def test_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    silent = {"messages": conversation("nobody answers")}
    lines = write_lines(tmp_path / "c.jsonl", [{"messages": conversation("who", "me")}, silent])
    out = tmp_path / "out" / "c"
    asked = ["data", "prepare", str(lines), "--kind", "chat", "--tokenizer", tokenizer, "-o", str(out)]
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert "1 conversations, " in said and "1 left out: nothing in them is learned" in said
    assert f"data: {{kind: chat, train: {out}, tokenizer: {tokenizer}}}" in said
    assert run(["data", "inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "\u27e6me<|im_end|>\n\u27e7" in said and "what is learned stands so" in said
    assert run([*asked[:-1], str(tmp_path / "all"), "--loss-on", "all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chat"]["targets"] == report["tokens"] - report["documents"] and report["chat"]["loss_on"] == "all"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "chat", "--vocab-size", "300"], "need the tokenizer of the model"),
        (["--kind", "chat", "--tokenizer", "t.json", "--bos"], "are not of conversations"),
        (["--tokenizer", "t.json", "--loss-on", "all"], "are of conversations"),
        (["--tokenizer", "t.json", "--chat-template", "t.jinja"], "are of conversations"),
    ],
)
def test_options_of_conversations(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "prepare", "c.jsonl", "-o", "c", *options]) == 2
    assert said in capsys.readouterr().err
