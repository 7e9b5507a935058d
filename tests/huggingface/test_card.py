"""The model card of an exported folder, with huggingface_hub as the judge of its head."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.recipes import work_in
from tplaunch.checkpoint.store import find_checkpoints
from tplaunch.cli.main import run
from tplaunch.errors import Exit
from tplaunch.files import append_line
from tplaunch.huggingface.card import hub_name, plain
from tplaunch.run.directory import RunDir
from tplaunch.run.events import AttemptBegan, AttemptEnded, Saved

RECIPE = """
name: tiny
model: {hidden_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 96, vocab_size: 300}
topology: {tp: 1, pp: 1, dp: 1}
training: {seq_len: 32, micro_batch_size: 2, global_batch_size: 4, steps: 4, precision: fp32, eval_every: 2,
  eval_steps: 1}
lr_schedule: {warmup_steps: 2}
data: {train: [{path: text.txt, weight: 3}, {path: other.txt, weight: 1}], validation: text.txt,
  tokenizer: {vocab_size: 300}}
logging: {every: 2, wandb: {mode: disabled}}
launch: {slurm: {env: {TOKEN_OF_MINE: hf_secret}}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of four steps in it."""
    folder = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch, RECIPE)
        (folder / "other.txt").write_text("Whether 'tis nobler in the mind to suffer.\n" * 200)
        assert run(["train", "tiny.yaml", "--run-dir", "run"]) == Exit.DONE
    yield folder


def card_of(folder: Path) -> tuple[ModelCard, dict[str, str]]:
    """The card as the hub reads it, and the rows of its tables."""
    card = ModelCard.load(folder / "README.md")
    return card, dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", card.text, re.M))


def test_what_a_run_tells(trained: Path, tmp_path: Path) -> None:
    assert run(["export", str(trained / "run"), str(tmp_path / "hf")]) == Exit.DONE
    card, rows = card_of(tmp_path / "hf")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["tplaunch", "llama"] and "license" not in data and "base_model" not in data
    last = RunDir(trained / "run").read_metrics()[-1]
    assert (
        rows["training loss"] == f"{last['loss']:.4f}" and rows["validation loss"] == f"{last['validation/loss']:.4f}"
    )
    assert (rows["steps"], rows["tokens"], rows["processes"]) == ("4", str(4 * 4 * 32), "1")
    assert rows["text.txt"].endswith("tokens, 75.0% of what was read")
    assert rows["other.txt"].endswith("tokens, 25.0% of what was read")
    assert (rows["batch"], rows["learning rate"]) == ("4 sequences", "warmup steps: 2")
    assert "tplaunch" in rows["made with"] and "# tiny" in card.text
    text = (tmp_path / "hf/README.md").read_text()
    for secret in (str(trained), str(Path.home()), os.uname().nodename, "hf_secret", "TOKEN_OF_MINE"):
        assert secret not in text


def test_the_hub_takes_the_folder_as_it_is(trained: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    assert run(["export", str(trained / "run"), str(hf)]) == Exit.DONE
    names = {path.name for path in hf.iterdir()}
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert names == {*expected, "tokenizer.json", "tokenizer_config.json"}
    for name in names:  # what `upload_folder` makes of each
        assert CommitOperationAdd(name, hf / name).upload_info.size == (hf / name).stat().st_size
    assert GenerationConfig.from_pretrained(hf).eos_token_id == 0
    code = re.findall(r"```python\n(.*?)```", (hf / "README.md").read_text(), re.S)
    assert len(code) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hf)
        exec(code[0], {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer})


def test_adapters_have_a_card_of_their_own(trained: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        sets = ["finetune.lora={rank: 4, alpha: 6, targets: [wq, down]}", "checkpoint.initial=run"]
        words = [word for one in sets for word in ("--set", one)]
        assert run(["train", "tiny.yaml", "--run-dir", str(tmp_path / "run"), *words]) == Exit.DONE
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "adapter")]) == Exit.DONE
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card, rows = card_of(tmp_path / "adapter")
    assert card.data.library_name == "peft" and card.data.to_dict()["tags"] == ["tplaunch", "lora"]
    assert (rows["rank"], rows["alpha"], rows["modules"]) == ("4", "6", "down_proj, q_proj")
    assert rows["initial weights"] == "run" and rows["steps"] == "4"
    numbers = 2 * 4 * (64 + 64 + 96 + 64)  # of each layer A and B of both
    assert f"Low-rank adapters of {numbers:,} parameters" in card.text and "PeftModel.from_pretrained" in card.text


def test_what_is_of_other_steps_is_left_out(trained: Path, tmp_path: Path) -> None:
    """A run that went on, in a second attempt, and was evaluated at two steps; its weights came from the hub."""
    shutil.copytree(trained / "run", tmp_path / "run")
    of = RunDir(tmp_path / "run")
    was = of.recipe.read_text()
    assert "initial: null" in was
    of.recipe.write_text(was.replace("initial: null", "initial: /home/me/hub/models--acme--tiny-1b/snapshots/0a1b"))
    of.events.unlink()
    for event in (
        AttemptBegan(1, time=100.0),
        AttemptEnded(1, time=160.0),
        AttemptBegan(2, time=1000.0),
        Saved(4, time=1030.0),
        AttemptEnded(0, time=5000.0),
    ):
        of.append(event)
    append_line(of.metrics, {"step": 6, "loss": 0.125, "validation/loss": 0.25})
    for step, acc in ((4, 0.75), (2, 0.5)):
        append_line(of.evaluations, {"step": step, "data": "/home/me/quiz|1.jsonl", "kind": "choices", "acc": acc})
    assert run(["export", str(of.root), str(tmp_path / "hf")]) == Exit.DONE
    card, rows = card_of(tmp_path / "hf")
    assert card.data.base_model == "acme/tiny-1b" and rows["initial weights"] == "acme/tiny-1b"
    assert rows["time"] == "1m30s"
    assert rows["training loss"] != "0.1250" and rows["validation loss"] != "0.2500"
    assert r"| quiz\|1.jsonl | acc 0.7500 |" in card.text and "0.5000" not in card.text
    assert "/home/me" not in card.text


def test_a_checkpoint_without_a_run(trained: Path, tmp_path: Path) -> None:
    (checkpoint,) = find_checkpoints(trained / "run")
    shutil.copytree(checkpoint, tmp_path / "alone" / checkpoint.name)
    assert run(["export", str(tmp_path / "alone" / checkpoint.name), str(tmp_path / "hf")]) == Exit.DONE
    card, rows = card_of(tmp_path / "hf")
    assert card.data.library_name == "transformers" and "# hf" in card.text
    assert rows["steps"] == "4" and "training loss" not in rows and "time" not in rows
    assert run(["import", str(tmp_path / "hf"), str(tmp_path / "ours")]) == Exit.DONE
    assert run(["export", str(tmp_path / "ours/step-00000000"), str(tmp_path / "back")]) == Exit.DONE
    rows = card_of(tmp_path / "back")[1]
    assert "steps" not in rows and rows["layers"] == "2"


def test_a_card_that_is_there_stays(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/README.md").write_text("mine")
    assert run(["export", str(trained / "run"), str(tmp_path / "hf")]) == Exit.USAGE
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "hf/README.md").read_text() == "mine"


def test_a_chat_template_is_told_of(trained: Path, tmp_path: Path) -> None:
    (checkpoint,) = find_checkpoints(trained / "run")
    at = tmp_path / "imported" / checkpoint.name
    shutil.copytree(checkpoint, at)
    template: Any = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    (at / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **template}))
    assert run(["export", str(at), str(tmp_path / "hf")]) == Exit.DONE
    card, _ = card_of(tmp_path / "hf")
    assert "conversational" in card.data.tags and "apply_chat_template" in card.text


def test_names() -> None:
    assert plain("a|b\n<c> `d`") == "a\\|b &lt;c> 'd'"
    assert hub_name("/x/models--org--My.Model-1/snapshots/0a1b") == "org/My.Model-1"
    assert hub_name("/x/models/org") == ""
