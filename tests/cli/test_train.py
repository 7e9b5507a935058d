"""`tplaunch train` and `command` up to the start of torchrun: what they print, write and refuse."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from tests.recipes import work_in
from tplaunch import machine
from tplaunch.checkpoint.store import Manifest, commit
from tplaunch.cli.main import run as tplaunch
from tplaunch.errors import Exit
from tplaunch.files import append_line
from tplaunch.recipe.load import load_recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Done

RECIPE = """
name: tiny
model: {hidden_size: 64, num_layers: 2, num_heads: 4, ffn_hidden_size: 128, vocab_size: 300}
topology: {tp: 2, dp: 2}
training: {seq_len: 16, global_batch_size: 4, steps: 5, precision: fp32}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, RECIPE)


def begun(root: Path, *, steps: int = 0, saved: int = 0) -> RunDir:
    """A run directory as one launch of the recipe leaves it."""
    run = RunDir(root)
    run.create()
    run.recipe.write_text(RECIPE)
    append_line(run.metrics, {"step": 1, "loss": 5.0})
    if saved:
        (run.checkpoints / f"step-{saved:08d}").mkdir()
    if steps:
        run.append(Done(step=steps))
    return run


def test_ranks_share_gpus_only_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "count_gpus", lambda: 1)
    line = ["train", "tiny.yaml", "--dry-run"]
    assert tplaunch(line) == Exit.USAGE
    assert "but there are 1 GPUs" in capsys.readouterr().err
    monkeypatch.setenv(machine.SHARE_GPUS, "1")
    assert tplaunch(line) == Exit.DONE
    assert tplaunch([*line, "--set", "topology.pp=2"]) == Exit.USAGE
    assert "topology.pp: 8 ranks on 1 GPUs cannot do that" in capsys.readouterr().err
    gathers = ["--set", "topology.sequence_parallel=true", "--set", "topology.cp=2"]
    assert tplaunch([*line, *gathers]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "topology.sequence_parallel: 8 ranks" in said and "topology.cp: 8 ranks" in said


def test_dry_run_prints_the_line_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "text.txt").unlink()
    before = set(here.rglob("*"))
    assert tplaunch(["train", "tiny.yaml", "--set", "topology.pp=2", "--dry-run"]) == Exit.DONE
    topology, line = capsys.readouterr().out.splitlines()
    assert topology.startswith("# tiny: tp 2 x pp 2 x dp 2 = 8 ranks, layers 1+1 by 1f1b")
    words = shlex.split(line)
    assert "TPLAUNCH_ATTEMPT=1" in words and "TPLAUNCH_RESUME=auto" in words
    assert words[-5:] == ["--nproc-per-node", "8", "-m", "tplaunch.worker", str(here / "runs/tiny")]
    assert set(here.rglob("*")) == before


def test_dry_run_imports_nothing_heavy(here: Path) -> None:
    code = (
        "import sys; from tplaunch.cli.main import run\n"
        "assert run(['train', 'tiny.yaml', '--dry-run']) == 0\n"
        "print([m for m in ('torch', 'numpy', 'wandb', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=os.environ, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_command_makes_everything_ready(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["command", "tiny.yaml", "--run-dir", "my run", "--set", "training.steps=7"]
    assert tplaunch(asked) == tplaunch(asked) == Exit.DONE
    first, second = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert "TPLAUNCH_ATTEMPT=1 " in first and "TPLAUNCH_ATTEMPT=2 " in second
    assert shlex.split(first)[-1] == str(here / "my run")
    resolved = load_recipe(here / "my run" / "recipe.yaml").recipe
    assert resolved.training.steps == 7
    (train,) = resolved.data.sources("train")
    assert Path(f"{train.path}.bin").exists() and Path(f"{train.path}.idx").exists()
    assert isinstance(resolved.data.tokenizer, str) and Path(resolved.data.tokenizer).exists()


def test_many_nodes_are_for_submit_or_paste(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["--set", "topology.nodes=2"]
    assert tplaunch(["train", "tiny.yaml", *nodes]) == Exit.USAGE
    assert "topology.nodes: asks for 2 nodes" in capsys.readouterr().err
    Path("my own.yaml").write_text(RECIPE)
    assert tplaunch(["train", "my own.yaml", *nodes]) == Exit.USAGE
    err = capsys.readouterr().err
    assert "tplaunch submit 'my own.yaml'" in err and "`tplaunch command 'my own.yaml'`" in err
    assert not (here / "runs").exists()
    assert tplaunch(["train", "tiny.yaml", *nodes, "--dry-run"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "--nnodes 2 --rdzv-backend c10d" in out and "--nproc-per-node 2" in out
    assert "# the same line on each of the 2 nodes" in out


def test_a_finished_run_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(here / "runs/tiny", steps=5, saved=5)
    assert tplaunch(["train", "tiny.yaml"]) == Exit.DONE
    assert "is finished: step 5 of 5 is done" in capsys.readouterr().out


def test_another_model_is_refused_field_by_field(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(here / "runs/tiny", saved=3)
    changed = ["--set", "model.ffn_hidden_size=256", "--set", "model.num_layers=4", "--set", "topology.dp=1"]
    assert tplaunch(["train", "tiny.yaml", *changed]) == Exit.USAGE
    err = capsys.readouterr().err
    assert "model.ffn_hidden_size: is 256, was 128" in err and "model.num_layers: is 4, was 2" in err
    assert "topology" not in err and "--run-dir" in err
    assert load_recipe(here / "runs/tiny/recipe.yaml").recipe.model.num_layers == 2


def test_another_model_may_replace_one_that_never_saved(here: Path) -> None:
    begun(here / "runs/tiny")
    assert tplaunch(["command", "tiny.yaml", "--set", "model.num_layers=4"]) == Exit.DONE
    assert load_recipe(here / "runs/tiny/recipe.yaml").recipe.model.num_layers == 4


def test_resume_none_keeps_runs_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(here / "runs/tiny")
    assert tplaunch(["train", "tiny.yaml", "--resume", "none"]) == Exit.USAGE
    assert "holds a run already" in capsys.readouterr().err
    run.metrics.unlink()
    assert tplaunch(["train", "tiny.yaml", "--resume", "none", "--dry-run"]) == Exit.DONE


def test_resume_from_a_path(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tplaunch(["train", "tiny.yaml", "--resume", "elsewhere/step-00000003", "--dry-run"]) == Exit.USAGE
    assert "there is no checkpoint" in capsys.readouterr().err
    temporary = here / "elsewhere/step-00000003.tmp"
    temporary.mkdir(parents=True)
    (temporary / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    made = commit(temporary, Manifest(3, {}, {}, {}))
    assert tplaunch(["train", "tiny.yaml", "--resume", "elsewhere/step-00000003", "--dry-run"]) == Exit.DONE
    assert f"TPLAUNCH_RESUME={here}/elsewhere/step-00000003 " in capsys.readouterr().out
    (made / "manifest.json").write_text("{}")
    assert tplaunch(["train", "tiny.yaml", "--resume", "elsewhere/step-00000003", "--dry-run"]) == Exit.USAGE
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_a_busy_run_directory_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with begun(here / "runs/tiny").lock():
        assert tplaunch(["train", "tiny.yaml"]) == Exit.USAGE
    err = capsys.readouterr().err
    assert "another launch is using runs/tiny" in err and f"process {os.getpid()} on" in err
    assert not list((here / "runs/tiny/logs").iterdir())


def test_missing_data_starts_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "text.txt").unlink()
    assert tplaunch(["train", "tiny.yaml"]) == Exit.USAGE
    assert "text.txt" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_prompt_is_measured_by_the_tokenizer_that_is_trained_first(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["command", "tiny.yaml", "--set"]
    assert tplaunch([*line, "logging.samples={every: 2, prompts: [To be, xyxyxyxy], max_tokens: 9}"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "logging.samples.prompts[1]: 8 tokens, and max_tokens 9 after them, exceed training.seq_len 16" in said
    assert "max_tokens: 8" in said and not (here / "runs").exists()
    assert tplaunch([*line, "logging.samples={every: 2, prompts: [To be, xyxyxyxy], max_tokens: 8}"]) == Exit.DONE
