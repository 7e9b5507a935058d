"""Conversations are learned alike on any topology, though ranks and microbatches have unequal numbers of targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.chats import some, write_lines, write_tokenizer
from tests.recipes import case, ranks
from tests.training import trainer
from tests.world import World

if TYPE_CHECKING:
    import torch

SEQ, STEPS = 64, 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prefixes: to train on, and of few and long answers to validate on."""
    from tplaunch.data.build import Chat, build

    folder = tmp_path_factory.mktemp("chats")
    tokenizer = write_tokenizer(folder / "tokenizer")
    for name, records in (("train", some(70, 1)), ("validation", some(40, 2, words=(1, 3)) + some(20, 3, (9, 20)))):
        build([write_lines(folder / f"{name}.jsonl", records)], folder / name, tokenizer, chat=Chat())
    return {name: str(folder / name) for name in ("train", "validation")}


def chat_case(corpora: dict[str, str], tp: int = 1, pp: int = 1, dp: int = 1, **how: Any) -> dict[str, Any]:
    training = {"seq_len": SEQ, "steps": STEPS, "precision": "fp64", "eval_steps": 3, **how.pop("training", {})}
    raw = case(tp, pp, dp, training=training, **how)
    return {**raw, "data": {"kind": "chat", **corpora}, "logging": {"wandb": {"mode": "disabled"}}}


def learn(raw: dict[str, Any], root: str, device: torch.device | None = None) -> list[float]:
    """Loss and gradient norm of each step on the recipe's own data, then the loss of validation."""
    from contextlib import closing

    made = trainer(raw, root, device)
    found: list[float] = []
    with closing(made._batches()) as batches:
        for batch in batches:
            result = made.step.run(batch)
            found += [result.loss, result.grad_norm]
    return [*found, made.validate()["validation/loss"]]


CASES: dict[str, dict[str, Any]] = {
    "cp2-dp2-micro1": {"dp": 2, "cp": 2, "training": {"micro_batch_size": 1}},
    "tp2-pp2-sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "dp4-zero3-micro2": {"dp": 4, "zero": 3, "training": {"micro_batch_size": 2}},
    "cp4": {"cp": 4},
    "ulysses2-pp2-interleaved": {"pp": 2, "cp": 2, "cp_kind": "ulysses", "schedule": "interleaved1f1b"},
    "tp2-cp2-dp2-zero2": {"tp": 2, "cp": 2, "dp": 2, "zero": 2, "training": {"micro_batch_size": 1}},
    "pp2-zbv-dp2": {"pp": 2, "dp": 2, "schedule": "zbvzerobubble", "training": {"micro_batch_size": 1}},
}
SLOW = CASES.keys() - {"cp2-dp2-micro1", "tp2-pp2-sp"}


@pytest.fixture(scope="module")
def alone(corpora: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    return {}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_conversations_are_learned_as_by_one_process(
    world: World, tmp_path: Path, corpora: dict[str, str], alone: dict[int, list[float]], name: str
) -> None:
    raw = chat_case(corpora, **CASES[name])
    layers = raw["model"]["num_layers"]
    if layers not in alone:
        one = chat_case(corpora, model={"num_layers": layers}, training={"micro_batch_size": 8})
        (alone[layers],) = world.run(1, learn, one, str(tmp_path / "alone"))
    for found in world.run(ranks(raw), learn, raw, str(tmp_path / "run")):
        assert found == pytest.approx(alone[layers], rel=1e-9)


@pytest.mark.slow
def test_packed_text_is_learned_as_by_one_process(world: World, tmp_path: Path) -> None:
    from tplaunch.data.build import build

    texts = [{"text": " ".join(message["content"] for message in one["messages"])} for one in some(90, 6)]
    build([write_lines(tmp_path / "t.jsonl", texts)], tmp_path / "t", 290)
    data = {"train": str(tmp_path / "t"), "validation": str(tmp_path / "t"), "packing": "best_fit"}
    alone: list[float] = []
    for number, how in enumerate(({}, {"dp": 2, "cp": 2}, {"tp": 2, "pp": 2})):
        raw = chat_case({}, **how, model={"num_layers": 4}, training={"micro_batch_size": 2}) | {"data": data}
        for found in world.run(ranks(raw), learn, raw, str(tmp_path / f"run-{number}")):
            alone = alone or found
            assert found == pytest.approx(alone, rel=1e-9)


def by_hand(raw: dict[str, Any], root: str) -> tuple[float, float, float, float]:
    """The mean over all targets of the first step, and of validation, by the trainer and from each conversation read
    on its own by the trainer's model."""
    import numpy as np
    import torch

    from tplaunch.data.indexed import IndexedTokens, open_loss
    from tplaunch.parallel.cross_entropy import IGNORE
    from tplaunch.train.batch import Batch, open_dataset

    made = trainer(raw, root)
    validation = made.validate()["validation/loss"]
    sums = []
    for split, count in (("train", 8), ("validation", 24)):
        source = made.recipe.data.sources(split)[0]
        corpus = IndexedTokens.open(source.path)
        loss = open_loss(corpus.prefix, len(corpus.tokens))
        dataset = open_dataset(made.recipe, [source], shuffle=split == "train")
        _, samples = dataset.order.locate(np.arange(count))
        total, targets = 0.0, 0
        for row in samples.tolist():
            for start, length in dataset._opened(0).rows[row]:
                tokens = torch.zeros(1, SEQ, dtype=torch.int64)
                labels = torch.full_like(tokens, IGNORE)
                tokens[0, :length] = torch.from_numpy(corpus.tokens[start : start + length].astype(np.int64))
                for place in np.flatnonzero(loss[start : start + length]).tolist():
                    labels[0, place - 1] = tokens[0, place]
                    targets += 1
                batch = Batch(tokens, labels, torch.arange(SEQ)[None])
                total += float(made.step.pipeline.evaluate(batch, 1.0))
        sums.append(total / targets)
    first = made.step.run(next(made._batches())).loss
    return first, sums[0], validation, sums[1]


def test_the_loss_is_the_mean_over_targets_of_conversations_each_read_alone(
    world: World, tmp_path: Path, corpora: dict[str, str]
) -> None:
    raw = chat_case(corpora, training={"micro_batch_size": 1})
    ((first, one_by_one, validation, each),) = world.run(1, by_hand, raw, str(tmp_path))
    assert first == pytest.approx(one_by_one, rel=1e-12)
    assert validation == pytest.approx(each, rel=1e-12)


def through_a_save(raw: dict[str, Any], root: str, steps: int) -> list[float]:
    """Losses of the steps up to `steps`, going on from the newest checkpoint."""
    made = trainer({**raw, "training": {**raw["training"], "steps": steps}}, root)
    made.resume("auto")
    losses = []
    run = made.step.run

    def noting(*args: Any) -> Any:
        result = run(*args)
        losses.append(result.loss)
        return result

    made.step.run = noting
    made.run()
    return losses


def test_a_run_goes_on_bit_for_bit(world: World, tmp_path: Path, corpora: dict[str, str]) -> None:
    raw = {**chat_case(corpora, training={"precision": "fp32"}), "lr_schedule": {"decay": "constant"}}
    (whole,) = world.run(1, through_a_save, raw, str(tmp_path / "whole"), 4)
    (begin,) = world.run(1, through_a_save, raw, str(tmp_path / "cut"), 2)
    (rest,) = world.run(1, through_a_save, raw, str(tmp_path / "cut"), 4)
    assert begin + rest == whole
