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
from tests.training import resumed, trainer
from tests.world import World
from tplaunch.cli.main import run
from tplaunch.data.indexed import IndexedWriter
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import Exit
from tplaunch.files import read_lines
from tplaunch.run.ranks import MEASURED

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
    training = {"steps": STEPS, "eval_every": 5, "eval_steps": 1, "precision": "fp64", **more.pop("training", {})}
    raw = case(**topology, model={"num_layers": 4}, training=training, optimizer={"lr": 1e-2})
    corpus = str(folder / "corpus")
    logging = {"every": 1, "wandb": {"mode": "disabled"}, "samples": samples or {}, **more.pop("logging", {})}
    return {**raw, "data": {"train": corpus, "validation": corpus}, "logging": logging, **more}


def state() -> list[Any]:
    """Everything that draws random numbers, and the bytes of all tensors but batches, which another thread reads."""
    import torch

    gc.unfreeze()  # what the trainer has frozen is not among the objects
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {s.data_ptr(): s.nbytes() for x in tensors if x.is_floating_point() for s in [x.untyped_storage()]}
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), sum(storages.values())]


def train(raw: dict[str, Any], root: str, tokenizer: str, slow: bool = False) -> list[bool]:
    """Train to the end by the real loop; whether each time the model wrote it left things as they were."""
    made = resumed(raw, root, tokenizer)
    real, same = made.sampler.write, []

    def write() -> list[str]:
        first = not same  # to look at all tensors takes longer than to write
        before = state() if first else None
        texts: list[str] = real()
        same.append(not first or state() == before)
        if slow and made.main and first:
            time.sleep(4.0)
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
    prompts = [text for prompt in PROMPTS for text in ("-p", prompt)]
    arguments = ["generate", str(alone), *prompts, "--max-tokens", str(MOST), "--temperature", "0", "--json"]
    assert run(arguments) == Exit.DONE
    theirs = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [one["text"] for one in theirs] == [one["text"] for one in found if one["step"] == STEPS]
    said = events(alone, "samples")
    assert [(one["step"], one["count"], one["prompt"]) for one in said] == [(s, 2, PROMPTS[0]) for s in (4, 8, STEPS)]
    assert said[0]["text"] == found[0]["text"] and said[0]["seconds"] > 0


@pytest.mark.parametrize(
    "topology",
    [
        {},
        {"tp": 2, "sequence_parallel": True},
        {"cp": 2},
        pytest.param({"pp": 2, "zero": 1}, marks=pytest.mark.slow),
        {"pp": 2, "schedule": "zbvzerobubble"},
        pytest.param({"dp": 2, "zero": 1}, marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_nobody_is_charged_for_it(world: World, tmp_path: Path, folder: Path) -> None:
    """Rank 0 takes 4 s more to write than the other: no part of a step, on no rank, has them. So it cannot be taken
    for a straggler, which is found by the time that it waits for its data. They come after step 4; a record, for which
    the ranks wait for each other, is of steps 4 and 5."""
    raw = recipe(folder, SAMPLES, dp=2, zero=1, logging={"every": 3, "per_rank_every": 5})
    world.run(2, train, raw, str(tmp_path), str(folder / "tokenizer.json"), True)
    rows = read_lines(tmp_path / "ranks.jsonl")
    assert [row["step"] for row in rows] == [5, 5, STEPS, STEPS]
    assert max(row[key] for row in rows for key in MEASURED if key.endswith("_s")) < 1.5
    assert events(tmp_path, "samples")[0]["seconds"] >= 4


def test_a_resumed_run_writes_each_text_once(world: World, tmp_path: Path, folder: Path) -> None:
    """It goes on after step 6; texts of steps 8 and 10 were there."""
    raw, tokenizer = recipe(folder, SAMPLES, checkpoint={"every": 6}), str(folder / "tokenizer.json")
    world.run(1, train, raw, str(tmp_path), tokenizer)
    before = samples(tmp_path)
    assert [one["step"] for one in before] == [4, 4, 8, 8, 10, 10]
    shutil.rmtree(tmp_path / f"checkpoints/step-{STEPS:08}")
    assert world.run(1, train, raw, str(tmp_path), tokenizer) == [[True] * 2]
    assert samples(tmp_path) == before


def compiled(raw: dict[str, Any], root: str, tokenizer: str) -> dict[int, int]:
    """Step -> graphs that were compiled up to its end."""
    from functools import partial

    import torch
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    shutil.copy(tokenizer, root)
    made, found = trainer(raw, root), {}
    real = made.log.add

    def add(result: Any) -> None:
        found[made.progress.step] = counters["stats"]["unique_graphs"]
        real(result)

    made.log.add = add
    made.resume("auto")
    made.run()
    return found


def test_nothing_is_compiled_for_it(world: World, tmp_path: Path, folder: Path) -> None:
    """Texts of every length between steps; the blocks are those of the first step."""
    training = {"compile": True, "eval_every": 0, "steps": 4, "precision": "fp32"}
    raw = recipe(folder, {**SAMPLES, "every": 1}, training=training)
    (found,) = world.run(1, compiled, raw, str(tmp_path), str(folder / "tokenizer.json"))
    assert found[1] > 0 and set(found.values()) == {found[1]}
    assert len(samples(tmp_path)) == 4 * len(PROMPTS)
