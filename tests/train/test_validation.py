"""Validation between steps: the same loss on any topology, and no trace of it in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.recipes import SEQ, VOCAB, case, ranks, resolved
from tests.training import trainer
from tests.world import World
from tplaunch.checkpoint.store import best_of, list_checkpoints, read_manifest, validation_of
from tplaunch.data.indexed import IndexedWriter
from tplaunch.data.tokenizer import Tokenizer, train_bpe

FOUR = {"num_layers": 4}
CASES = {
    "tp2-sp": case(2, sequence_parallel=True, model=FOUR),
    "dp2-zero3": case(1, 1, 2, zero=3, model=FOUR),
    "pp2-dp2": case(1, 2, 2),
    "cp2-tp2-sp": case(2, cp=2, sequence_parallel=True, model=FOUR),
    "ulysses2-pp2": case(1, 2, cp=2, cp_kind="ulysses"),
    "pp2-dp2-zero2": case(1, 2, 2, zero=2),
    "interleaved": case(1, 2, schedule="interleaved1f1b"),
    "zero-bubble": case(1, 2, schedule="interleavedzerobubble"),
    "zbv": case(1, 2, schedule="zbvzerobubble"),
    "dualpipev": case(1, 2, schedule="dualpipev"),
}


def losses(raw: dict[str, Any], validate: bool) -> list[float]:
    """Losses of: validation, step, validation, step, validation (steps only, without `validate`)."""
    import torch.distributed as dist

    from tplaunch.model.build import build_stages
    from tplaunch.optim.gradients import GradientFinalizer
    from tplaunch.optim.optimizer import ShardedOptimizer
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import Batch
    from tplaunch.train.step import make_pipeline

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    stages = build_stages(recipe, mesh)
    pipeline = make_pipeline(stages, mesh, recipe)
    optimizer = ShardedOptimizer(stages, recipe, mesh)
    finalizer = GradientFinalizer(
        stages, mesh, schedule=recipe.topology.schedule, num_stages=pipeline.num_stages, tied=False
    )
    data = torch.randint(VOCAB, (16, SEQ + 1), generator=torch.Generator().manual_seed(3))
    mine = data.chunk(mesh.topology.dp)[mesh.coordinates.dp]
    batch, scale = Batch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous()), 1 / (16 * SEQ)

    def everywhere(loss: torch.Tensor) -> float:
        total = loss.clone() if pipeline.has_loss and mesh.tp.rank == 0 else torch.zeros_like(loss)
        dist.all_reduce(total)
        return float(total)

    found = []
    for turn in range(3):
        if validate:
            found.append(everywhere(pipeline.evaluate(batch, scale)))
        if turn < 2:
            found.append(everywhere(pipeline.train(batch, scale)))
            finalizer.complete()
            optimizer.step(0.01)
            optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def reference(world: World) -> list[float]:
    (found,) = world.run(1, losses, case(model=FOUR), True)
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # validation sees the weights that the next step sees
    assert found[2] == pytest.approx(found[3], rel=1e-6)
    assert found[4] < found[2] < found[0]
    return found


def test_one_process_trains_the_same_without_validation(world: World, reference: list[float]) -> None:
    assert world.run(1, losses, case(model=FOUR), False)[0] == reference[1::2]


@pytest.mark.parametrize("name", CASES)
def test_validation_between_steps(world: World, reference: list[float], name: str) -> None:
    raw = CASES[name]
    size = ranks(raw)
    for found in world.run(size, losses, raw, True):
        assert found == pytest.approx(reference, rel=1e-5)


TEXT = (Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt").read_text()
OTHER = "Größe, Würde, Übermut — “so” 🎭\n" * 150
# Losses of one set; and of two, one of them of two corpora, with steps of its own.
ONE = "other"
NAMED = {"other": "other", "play": {"path": ["play", {"path": "other", "weight": 3.0}], "steps": 2}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and two corpora that it made."""
    folder = tmp_path_factory.mktemp("texts")
    train_bpe([TEXT[:20000], OTHER], VOCAB, folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    for name, text in (("play", TEXT[:30000]), ("other", OTHER)):
        writer = IndexedWriter(folder / name, tokenizer.dtype)
        for begin in range(0, len(text), 700):
            writer.add(np.append(tokenizer.encode(text[begin : begin + 700]), np.array(tokenizer.eod, tokenizer.dtype)))
            writer.end_document()
        writer.compose()
        writer.commit()
    return folder


def with_data(raw: dict[str, Any], folder: Path, validation: Any, **sections: Any) -> dict[str, Any]:
    def placed(value: Any) -> Any:
        if isinstance(value, str):
            return str(folder / value)
        if isinstance(value, list):
            return [placed(one) for one in value]
        return {key: placed(one) if isinstance(one, (str, list, dict)) else one for key, one in value.items()}

    data = {"train": placed("play"), "validation": placed(validation), "tokenizer": placed("tokenizer.json")}
    training = {**raw["training"], "eval_every": 2, "eval_steps": 3}
    return {**raw, "data": data, "training": training, "logging": {"wandb": {"mode": "disabled"}}, **sections}


def measured(raw: dict[str, Any], root: str) -> dict[str, float]:
    return trainer(raw, root).validation.measure()


def test_each_set_is_measured_by_itself(world: World, texts: Path, tmp_path: Path) -> None:
    (named,) = world.run(1, measured, with_data(case(model=FOUR), texts, NAMED), str(tmp_path))
    assert set(named) == {
        f"validation/{name}/{figure}" for name in NAMED for figure in ("loss", "perplexity", "bits_per_byte")
    }
    (plain,) = world.run(1, measured, with_data(case(model=FOUR), texts, ONE), str(tmp_path))
    assert plain == {key.replace("other/", ""): value for key, value in named.items() if "other" in key}
    assert plain["validation/perplexity"] == pytest.approx(math.exp(plain["validation/loss"]))
    # The text of its targets, decoded: whole documents, and a piece that ends inside of one.
    tokens = np.fromfile(texts / "other.bin", np.uint16)[1 : 3 * 8 * SEQ + 1]
    tokenizer = Tokenizer(texts / "tokenizer.json")
    text = tokenizer.decode(tokens)
    assert "\ufffd" not in text
    bits = plain["validation/loss"] * len(tokens) / math.log(2)
    assert plain["validation/bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-6)
    raw = with_data(case(1, 1, 2, cp=2, model=FOUR), texts, NAMED)
    for rank in world.run(ranks(raw), measured, raw, str(tmp_path)):
        assert rank == pytest.approx(named, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_named_sets_on_any_topology(world: World, texts: Path, tmp_path: Path, name: str) -> None:
    (named,) = world.run(1, measured, with_data(case(model=FOUR), texts, NAMED), str(tmp_path))
    raw = with_data(CASES[name], texts, NAMED)
    for rank in world.run(ranks(raw), measured, raw, str(tmp_path)):
        assert rank == pytest.approx(named, rel=1e-5)


def test_masked_targets_count_neither_in_loss_nor_in_bytes(world: World, texts: Path, tmp_path: Path) -> None:
    raw = with_data(case(training={"eod_mask_loss": True}), texts, ONE)
    (found,) = world.run(1, measured, raw, str(tmp_path))
    tokenizer = Tokenizer(texts / "tokenizer.json")
    tokens = np.fromfile(texts / "other.bin", np.uint16)[: 3 * 8 * SEQ + 1]
    begins = np.flatnonzero(tokens == tokenizer.eod)[:-1] + 1
    left_out = sum(len(tokenizer.decode([token]).encode()) for token in tokens[begins])
    whole = len(tokenizer.decode(tokens[1:]).encode())
    bits = found["validation/loss"] * (len(tokens) - 1 - len(begins)) / math.log(2)
    # Batches count alike, whatever targets they have: a mean of means.
    assert found["validation/bits_per_byte"] == pytest.approx(bits / (whole - left_out), rel=2e-3)


def train_to_the_end(raw: dict[str, Any], root: str) -> None:
    made = trainer(raw, root)
    made.resume("auto")
    made.run()


def test_the_best_checkpoint_stays(world: World, texts: Path, tmp_path: Path) -> None:
    best = "validation/other/loss"
    kept = {"every": 2, "keep": 1, "keep_best": best}
    # A rate that rises: what it learns first it unlearns.
    raw = with_data(case(optimizer={"lr": 3.0, "name": "sgd"}, training={"steps": 8}), texts, NAMED, checkpoint=kept)
    raw["training"]["grad_clip"] = None
    raw["lr_schedule"] = {"warmup_steps": 16}
    world.run(1, train_to_the_end, raw, str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {one["step"]: one[best] for one in records if best in one}
    assert set(losses) == {2, 4, 6, 8}
    place = min(losses, key=lambda step: losses[step])
    here = dict(list_checkpoints(tmp_path / "checkpoints"))
    assert set(here) == {place, 8}
    assert validation_of(read_manifest(here[place]))[best] == losses[place]
    raw["training"]["steps"] = 10  # another launch knows which is the best
    world.run(1, train_to_the_end, raw, str(tmp_path))
    here = dict(list_checkpoints(tmp_path / "checkpoints"))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {one["step"]: one[best] for one in records if best in one}
    place = min(losses, key=lambda step: losses[step])
    assert set(here) == {place, 10}
    assert best_of(list(here.values()), best) == here[place]
    names = {json.loads(line).get("of") for line in (tmp_path / "events.jsonl").read_text().splitlines()}
    assert names >= set(NAMED)
