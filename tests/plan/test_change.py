"""Changes of a recipe: applied, printed for a shell, written into a file; and what tune may propose."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from tplaunch.check.recipe import check_recipe
from tplaunch.cli.main import run
from tplaunch.plan.case import Case
from tplaunch.plan.change import Change
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recompute
from tplaunch.spec.gpu import GPUS, write_gpu


def case(*settings: str) -> Case:
    return Case(check_recipe(load_recipe("llama3-8b", settings), need_data=False).recipe, GPUS["h100-80gb"])


def test_a_change_is_quoted_for_a_shell_and_read_back() -> None:
    values = {
        "training.recompute": Recompute(every=2),
        "topology.stage_layers": None,
        "topology.sequence_parallel": False,
    }
    change = Change(values)
    words = shlex.split(change.options)
    assert words[::2] == ["--set"] * 3
    recipe = load_recipe("llama3-8b", words[1::2]).recipe
    assert recipe.training.recompute == Recompute(every=2)
    assert (recipe.topology.stage_layers, recipe.topology.sequence_parallel) == (None, False)


def test_what_tune_prints_as_json_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "llama3-8b", "--gpus", "8", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["choices"][0]["set"]
    assert "topology.stage_layers=null" in best
    settings = [word for part in best.split(", ") for word in ("--set", part)]
    assert run(["plan", "llama3-8b", *settings]) == 0


def test_layers_are_split_anew_unless_the_recipe_splits_them() -> None:
    assert Change({"topology.pp": 4, "topology.tp": 2}).apply(case()).recipe.topology.stage_layers == [8, 9, 9, 6]
    listed = case("topology={tp: 4, pp: 2, dp: 1, stage_layers: [20, 12], gpus_per_node: 8}")
    assert Change({"topology.zero": 2}).apply(listed).recipe.topology.stage_layers == [20, 12]
    assert Change({"topology.pp": 1}).apply(listed) is None, "20 + 12 layers are two stages"


def test_tune_proposes_nothing_that_a_ramp_up_forbids(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ramp = ["--set", "training.batch_ramp_up={start: 12, increment: 12, steps: 100}"]
    ramp += ["--set", "training.global_batch_size=96"]
    best = tmp_path / "best.yaml"
    assert run(["tune", "llama3-8b", "--gpus", "8", "--write", str(best), *ramp]) == 0
    capsys.readouterr()
    assert run(["plan", str(best)]) == 0, capsys.readouterr().err


def test_a_tuned_recipe_keeps_what_it_was_tuned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine, best = tmp_path / "machine.json", tmp_path / "tuned" / "best.yaml"
    best.parent.mkdir()
    write_gpu(GPUS["a100-80gb"], machine)
    asked = ["--set", "training.global_batch_size=32", "--set", "training.seq_len=2048", "--gpu", str(machine)]
    assert run(["tune", "llama3-8b", "--gpus", "16", "--write", str(best), *asked]) == 0
    capsys.readouterr()
    written = yaml.safe_load(best.read_text())
    assert written["training"]["global_batch_size"] == 32 and written["training"]["seq_len"] == 2048
    recipe = load_recipe(best).recipe
    assert (recipe.training.global_batch_size, recipe.training.seq_len) == (32, 2048)
    assert recipe.hardware.gpu == str(machine)
    assert run(["plan", str(best), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] == "a100-80gb"


@pytest.mark.parametrize("name", ["step.png", "nowhere/step.svg"])
def test_a_timeline_that_cannot_be_written_is_refused_before_the_plan(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "llama3-8b", "--timeline", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--timeline" in err
