"""Small models, trained and exported as a user would, and what is expected of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.environments import python_of
from tests.recipes import work_in
from tplaunch.cli.main import run
from tplaunch.errors import Exit

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TEXTS = ["ROMEO:", "To be, or not to be", "What light through yonder window breaks?\n"]
LENGTH = 40  # tokens that follow a prompt
# As Mixtral has them, whose layers all have experts, which all are routed to.
MIXTRAL = ("shared_ffn_hidden_size=null", "dense_layers=0", "router=softmax", "bias_rate=null")


def made(folder: Path, recipe: str, *sets: str) -> Path:
    """The exported model of a recipe, trained by one process, as a folder."""
    alone = [f"topology.{axis}=1" for axis in ("tp", "pp", "dp", "ep")]
    keys = [*alone, "training.eval_every=0", "checkpoint.every=0", "logging.wandb.mode=disabled", *sets]
    options = [word for key in keys for word in ("--set", key)]
    assert run(["train", recipe, "--run-dir", str(folder / "run"), *options]) == Exit.DONE
    assert run(["export", str(folder / "run"), str(folder / "hf")]) == Exit.DONE
    return folder / "hf"


@pytest.fixture(scope="session", autouse=True)
def environments() -> None:
    """Skip before anything is trained."""
    python_of("vllm")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of the session's models."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        yield work_in(folder, patch, "")


@pytest.fixture(scope="session")
def quickstart(place: Path) -> Path:
    return made(place / "quickstart", str(RECIPES / "quickstart.yaml"))


@pytest.fixture(scope="session")
def experts(place: Path) -> Path:
    sets = [f"model.moe.{key}" for key in MIXTRAL]
    return made(place / "experts", str(RECIPES / "quickstart-experts.yaml"), "topology.expert_tp=1", *sets)


@pytest.fixture(scope="session")
def qwen3_moe(place: Path) -> Path:
    sets = [f"model.moe.{key}" for key in MIXTRAL]
    sets += ["model.qk_norm=true", "topology.expert_tp=1"]
    return made(place / "qwen3_moe", str(RECIPES / "quickstart-experts.yaml"), *sets)


def generated(model: Path, prompts: list[dict[str, object]], *options: str) -> list[list[int]]:
    """Tokens that `tplaunch generate` makes after prompts (lines of JSONL), greedily."""
    asked, out = model.with_name("prompts.jsonl"), model.with_name("out.jsonl")
    asked.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = ["generate", str(model), "--prompts", str(asked), "--temperature", "0", "--max-tokens", str(LENGTH)]
    assert run([*arguments, "--output", str(out), *options]) == Exit.DONE
    return [json.loads(line)["tokens"] for line in out.read_text().splitlines()]
