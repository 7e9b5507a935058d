"""What a run on conversations says before it starts, and what it keeps of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chats import CHATML, MARKED, conversation, some, write_lines, write_tokenizer
from tests.recipes import work_in
from tplaunch.check.recipe import check_recipe
from tplaunch.cli.common import data_lines
from tplaunch.cli.main import run
from tplaunch.errors import RecipeError
from tplaunch.launch.prepare import make_ready, write_ready
from tplaunch.launch.resume import data_changes
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir

RECIPE = """\
name: chat
model: {hidden_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 96, vocab_size: 300}
training: {seq_len: 64, global_batch_size: 4, steps: 2, precision: fp32}
data: {kind: chat, train: chats.jsonl, tokenizer: tokenizer/tokenizer.json}
logging: {wandb: {mode: disabled}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work_in(tmp_path, monkeypatch, RECIPE)
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    records = [*some(30), {"messages": conversation("nobody answers")}]
    write_lines(tmp_path / "chats.jsonl", records)
    (tmp_path / "mine.jinja").write_text(MARKED)
    return tmp_path


def test_the_run_keeps_the_template_and_says_how_conversations_fit(here: Path) -> None:
    checked = check_recipe(load_recipe("tiny.yaml", ["finetune.chat_template=mine.jinja"]))
    assert checked.recipe.training.document_mask
    run_dir = RunDir(here / "run")
    run_dir.create()
    ready = make_ready(checked, run_dir)
    write_ready(ready, run_dir)
    assert (run_dir.root / "chat_template.jinja").read_text() == MARKED
    assert (run_dir.root / "tokenizer_config.json").exists()
    lines = data_lines(ready.checked.recipe)
    assert " cut off at the end of a row" in lines[1] and "1 left out: nothing in them is learned" in lines[1]
    kept = load_recipe(run_dir.recipe).recipe
    assert kept.data.kind == "chat" and kept.training.document_mask
    # Another template teaches other tokens: the data of the run are others.
    other = make_ready(check_recipe(load_recipe("tiny.yaml")), RunDir(here / "other"))
    assert list(data_changes(ready.facts, other.facts)) == ["data.train"]


def test_what_is_no_conversation_is_said_before_the_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (here / "chats.jsonl").open("a") as lines:
        lines.write(json.dumps({"text": "to be"}) + "\n")
    assert run(["train", "tiny.yaml"]) == 2
    said = capsys.readouterr().err
    assert "chats.jsonl:32: data.train: no messages, and no prompt with a completion" in said
    assert not (here / "runs/chat/events.jsonl").exists()
    (here / "mine.jinja").write_text("{% for %}")
    with pytest.raises(
        RecipeError, match=r"finetune\.chat_template: the chat template .*/mine.jinja cannot be followed"
    ):
        make_ready(
            check_recipe(load_recipe("tiny.yaml", ["finetune.chat_template=mine.jinja"])), RunDir(here / "other")
        )
