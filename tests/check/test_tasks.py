"""What a recipe says of `eval` and cannot be measured is said before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import work_in
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit

RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 1, num_heads: 4, ffn_hidden_size: 64, vocab_size: 400}
topology: {dp: 1}
training: {seq_len: 16, global_batch_size: 2, steps: 2, precision: fp32, eval_every: 1}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
eval: {tasks: TASKS}
"""
GOOD = '{"question": "To be, or", "choices": ["not", "be"], "answer": 0}\n'


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("[{data: away.txt}]", "eval.tasks[0].data: "),
        ("[{choices: away.jsonl}]", "eval.tasks[0].choices: "),
        ("[{data: text.txt}, {choices: bad.jsonl}]", "bad.jsonl:2: eval.tasks[1].choices: no question"),
        ("[{data: text.txt}, {choices: text.jsonl}]", "two tasks text"),
        ("[{data: text.txt, choices: text.jsonl}]", "of data and choices one must be there"),
        ("[{choices: long.jsonl}]", "a choice has as many tokens as the 16"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: Any, tasks: str, said: str, capsys: Any) -> None:
    work_in(tmp_path, monkeypatch, RECIPE.replace("TASKS", tasks))
    (tmp_path / "text.jsonl").write_text(GOOD)
    (tmp_path / "bad.jsonl").write_text(GOOD + '{"question": "To be"}\n')
    (tmp_path / "long.jsonl").write_text(GOOD.replace('"not"', '"' + "q z " * 40 + '"'))
    assert tplaunch(["command", "tiny.yaml"]) == Exit.USAGE
    assert said in capsys.readouterr().err and not (tmp_path / "runs").exists()
