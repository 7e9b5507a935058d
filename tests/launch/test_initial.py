"""`checkpoint.initial` before any process starts, and stages that follow each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.test_text import write_folder
from tests.recipes import work_in
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit
from tplaunch.huggingface.config import read_config
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Model
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Initialized

RECIPE = """
name: first
model: MODEL
topology: {dp: 1}
training: {seq_len: 16, global_batch_size: 2, steps: 2, precision: fp32}
optimizer: {lr: 1.0e-3}
data: {train: text.txt}
checkpoint: {initial: hf}
logging: {every: 1, wandb: {mode: disabled}}
"""
SECOND = """
extends: tiny.yaml
name: second
checkpoint: {initial: runs/first}
training: {steps: 1}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path / "hf")
    model = read_config(tmp_path / "hf/config.json").model
    return work_in(tmp_path, monkeypatch, RECIPE.replace("MODEL", said(model)))


def said(model: Model) -> str:
    return json.dumps(model.model_dump(mode="json", exclude_defaults=True))


def refused(capsys: pytest.CaptureFixture[str], *settings: str, exit_code: int = Exit.USAGE) -> str:
    """What is said of a recipe that is not started."""
    sets = [word for setting in settings for word in ("--set", setting)]
    assert tplaunch(["command", "tiny.yaml", *sets]) == exit_code
    assert not Path("runs/first/recipe.yaml").exists()
    return capsys.readouterr().err


def test_the_recipes_model_is_held_against_the_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = read_config(here / "hf/config.json").model.num_layers
    said = refused(capsys, "model.num_layers=9", "model.activation=geglu")
    assert f"model.num_layers: is 9, and {here}/hf/config.json has {layers}" in said
    assert "why: its weights are of another model" in said and f"fix: num_layers: {layers}, or other weights" in said
    assert 'model.activation: is "geglu"' in said
    text = (here / "tiny.yaml").read_text()
    (here / "tiny.yaml").write_text(text.replace('"num_layers": ', '"num_layers": 1'))
    assert "tiny.yaml:3:42: model.num_layers: is 13" in refused(capsys)  # where it is said


@pytest.mark.parametrize("damage", ["pickled", "torn", "another shape", "nothing"])
def test_what_cannot_be_loaded_is_said_before(here: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = here / "hf/model.safetensors"
    if damage == "pickled":
        file.rename(here / "hf/pytorch_model.bin")
        expected = "pickled weights"
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:-4])
        expected = "ends beyond the file"
    elif damage == "another shape":
        save_file({**load_file(file), "model.norm.weight": torch.ones(3)}, file)
        expected = "model.norm.weight is [3]"
    else:
        (here / "hf/config.json").unlink()
        expected = "no checkpoint, and no model"
    said = refused(capsys)
    assert expected in said and "checkpoint.initial" in said and "Traceback" not in said


def test_a_head_of_its_own_under_tied_embeddings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((here / "hf/config.json").read_text())
    (here / "hf/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert tplaunch(["command", "tiny.yaml"]) == Exit.DONE  # the recipe says untied, as transformers reads it
    said = refused_fresh(capsys, "model.tie_embeddings=true")
    assert "model.tie_embeddings: is true" in said and "differs from the embedding" in said


def refused_fresh(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    sets = [word for setting in settings for word in ("--set", setting)]
    assert tplaunch(["command", "tiny.yaml", "--run-dir", "runs/fresh", *sets]) == Exit.USAGE
    return capsys.readouterr().err


def test_the_check_loads_no_torch(here: Path) -> None:
    code = (
        "import sys; from tplaunch.cli.main import run\n"
        "assert run(['train', 'tiny.yaml', '--dry-run']) == 0\n"
        "assert run(['train', 'tiny.yaml', '--dry-run', '--set', 'model.num_layers=9']) == 2\n"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=os.environ, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_paths_are_absolute_for_ranks_that_run_elsewhere(here: Path) -> None:
    assert tplaunch(["command", "tiny.yaml"]) == Exit.DONE
    written = load_recipe(RunDir(here / "runs/first").recipe).recipe
    assert written.checkpoint.initial == str(here / "hf")


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    from tests.huggingface.test_huggingface import tensors

    out = checkpoint.parent / f"{checkpoint.name}-exported"
    assert tplaunch(["export", str(checkpoint), str(out), "--precision", "fp32"]) == Exit.DONE
    return tensors(out)


def test_stages_follow_each_other(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder, its tokenizer for a text; then a run that extends the recipe and begins with what it has learnt."""
    (here / "second.yaml").write_text(SECOND)
    assert tplaunch(["command", "second.yaml"]) == Exit.USAGE
    assert "no checkpoint" in capfd.readouterr().err
    assert tplaunch(["train", "tiny.yaml"]) == Exit.DONE
    first, second = RunDir(here / "runs/first"), RunDir(here / "runs/second")
    whole = first.checkpoints / "step-00000002"
    torn = first.checkpoints / "step-00000009"
    torn.mkdir()
    (torn / "manifest.json").write_text("{")  # newer, and not complete
    assert tplaunch(["train", "second.yaml", "--set", "optimizer.lr=1.0e-30"]) == Exit.DONE
    (event,) = [one for one in second.history().events if isinstance(one, Initialized)]
    assert (event.path, event.of_step) == (str(whole), 2)
    assert json.loads(second.tokenizer.read_text())["model"] == json.loads(first.tokenizer.read_text())["model"]
    mine, theirs = tensors_of(second.checkpoints / "step-00000001"), tensors_of(whole)
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in theirs)
    capfd.readouterr()
    assert tplaunch(["runs", "show", "runs/second"]) == Exit.DONE
    shown = capfd.readouterr().out
    assert "weights of" in shown and "runs/first/checkpoints/step-00000002" in shown.replace("\n", "")
    # A later launch of the same run does not ask for them again.
    assert tplaunch(["command", "second.yaml", "--set", "training.steps=2"]) == Exit.DONE
    assert load_recipe(second.recipe).recipe.checkpoint.initial == str(whole)
    assert "changed: checkpoint.initial" not in capfd.readouterr().err
