"""Texts that the model writes while it is trained: those of `tplaunch generate`, on every topology, at no cost to the
run's numbers."""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recipes import VOCAB, case
from tests.training import trainer
from tests.world import World
from tplaunch.cli.main import run
from tplaunch.data.indexed import IndexedWriter
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import Exit
from tplaunch.files import read_lines

STEPS, EVERY, MOST = 10, 4, 12
PROMPTS = ["to be", "that is the"]
SAMPLES = {"every": EVERY, "prompts": PROMPTS, "max_tokens": MOST}
WEIGHED = ("loss", "loss_last", "grad_norm", "param_norm", "update_ratio", "validation/loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a corpus that was made with it."""
    folder = tmp_path_factory.mktemp("text")
    text = "to be or not to be, that is the question: whether it is nobler in the mind to suffer. " * 20
    train_bpe([text], VOCAB, folder / "tokenizer.json")
    writer = IndexedWriter(folder / "corpus", np.dtype(np.uint16))
    for _ in range(4):
        writer.add(Tokenizer(folder / "tokenizer.json").encode(text).astype(np.uint16))
        writer.end_document()
    writer.compose()
    writer.commit()
    return folder


def recipe(folder: Path, samples: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    topology = {name: more.pop(name) for name in [*more] if name not in ("training", "checkpoint", "logging")}
    training = {"steps": STEPS, "eval_every": 5, "precision": "fp64", **more.pop("training", {})}
    raw = case(**{"tp": 1, "pp": 1, "dp": 1, **topology}, training=training, optimizer={"lr": 1e-2})
    corpus = str(folder / "corpus")
    logging = {"every": 1, "wandb": {"mode": "disabled"}, "samples": samples or {}, **more.pop("logging", {})}
    return {**raw, "data": {"train": corpus, "validation": corpus}, "logging": logging, **more}


def state() -> list[Any]:
    """Everything that draws random numbers, and the bytes of all tensors."""
    import torch

    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and type(x) in (torch.Tensor,)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), sum(storages.values())]


def train(raw: dict[str, Any], root: str, tokenizer: str, slow: bool = False) -> list[bool]:
    """Train to the end by the real loop; whether each time the model wrote it left things as they were."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(root).mkdir(exist_ok=True)
        shutil.copy(tokenizer, root)
    dist.barrier()
    made = trainer(raw, root)
    made.resume("auto")
    real, same = made.sampler.write, []

    def write() -> list[str]:
        before = state()
        texts: list[str] = real()
        same.append(state() == before)
        if slow and made.main:
            time.sleep(2.0)
        return texts

    made.sampler.write = write
    made.run()
    return same


def samples(root: Path) -> list[dict[str, Any]]:
    return read_lines(root / "samples.jsonl")


def curve(root: Path) -> list[list[Any]]:
    return [[record.get(key) for key in ("step", *WEIGHED)] for record in read_lines(root / "metrics.jsonl")]


def events(root: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(root / "events.jsonl") if event["event"] == name]


@pytest.fixture(scope="module")
def alone(world: World, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    root = tmp_path_factory.mktemp("alone")
    assert world.run(1, train, recipe(folder, SAMPLES), str(root), str(folder / "tokenizer.json")) == [[True] * 3]
    return root


def test_texts_are_those_of_generate(folder: Path, alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = samples(alone)
    assert [(one["step"], one["prompt"]) for one in found] == [(s, p) for s in (4, 8, STEPS) for p in PROMPTS]
    assert len({one["text"] for one in found if one["prompt"] == PROMPTS[0]}) > 1, "the weights are those of the step"
    (alone / "recipe.yaml").unlink(missing_ok=True)
    prompts = [text for prompt in PROMPTS for text in ("-p", prompt)]
    arguments = ["generate", str(alone), *prompts, "--max-tokens", str(MOST), "--temperature", "0", "--json"]
    assert run(arguments) == Exit.DONE
    theirs = json.loads(capfd.readouterr().out)
    assert [one["text"] for one in theirs] == [one["text"] for one in found if one["step"] == STEPS]
    said = events(alone, "samples")
    assert [(one["step"], one["count"], one["prompt"]) for one in said] == [(s, 2, PROMPTS[0]) for s in (4, 8, STEPS)]
    assert said[0]["text"] == found[0]["text"] and said[0]["seconds"] > 0


@pytest.mark.parametrize(
    "topology",
    [
        {},
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "zero": 1},
        {"pp": 2, "schedule": "zbvzerobubble"},
        {"dp": 2, "zero": 1},
        {"dp": 2, "zero": 3},
    ],
    ids=lambda topology: "-".join(f"{key}{value}" for key, value in topology.items()) or "alone",
)
def test_any_topology_writes_the_same_and_trains_as_without(
    world: World, tmp_path: Path, folder: Path, alone: Path, topology: dict[str, Any]
) -> None:
    on, off, tokenizer = alone, tmp_path / "off", str(folder / "tokenizer.json")
    ranks = 2 if topology else 1
    if topology:
        on = tmp_path / "on"
        same = world.run(ranks, train, recipe(folder, SAMPLES, **topology), str(on), tokenizer)
        assert same == [[True] * 3] * 2
        assert samples(on) == samples(alone)
    world.run(ranks, train, recipe(folder, None, **topology), str(off), tokenizer)
    assert curve(on) == curve(off)
    assert len(curve(on)) == STEPS and not (off / "samples.jsonl").exists()
