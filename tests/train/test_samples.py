"""Every sample is read once, whatever changes between two launches of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recipes import SEQ, case
from tests.training import trainer
from tests.world import World
from tplaunch.checkpoint.state import TrainingProgress
from tplaunch.data.indexed import IndexedWriter


def train_on(raw: dict[str, Any], root: str) -> list[int]:
    """Go on with a run to its recipe's last step; the numbers of the samples that this rank has read."""
    from tplaunch.train import trainer as module

    read: list[int] = []
    real = module.make_batch

    def noting(recipe: Any, dataset: Any, samples: range) -> Any:
        read.extend(samples)
        return real(recipe, dataset, samples)

    module.make_batch = noting
    try:
        made = trainer(raw, root)
        made.resume("auto")
        made.run()
    finally:
        module.make_batch = real
    return read


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    prefix = tmp_path / "corpus"
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for start in range(40):
        writer.add((np.arange(200) + start).astype(np.uint16) % 300)
        writer.end_document()
    writer.compose()
    writer.commit()
    return str(prefix)


def recipe(corpus: str, steps: int, batch: int, dp: int = 1, **training: Any) -> dict[str, Any]:
    values = {"steps": steps, "global_batch_size": batch, "micro_batch_size": 1, **training}
    raw = case(1, 1, dp, model={"num_layers": 1}, training=values)
    return {**raw, "data": {"train": corpus}, "logging": {"wandb": {"mode": "disabled"}}}


def read_by_all(world: World, raw: dict[str, Any], root: Path) -> list[int]:
    return sorted(sample for rank in world.run(raw["topology"]["dp"], train_on, raw, str(root)) for sample in rank)


@pytest.mark.parametrize("dp", [1, 2])
def test_a_smaller_batch_goes_on_at_the_next_sample(world: World, tmp_path: Path, corpus: str, dp: int) -> None:
    root = tmp_path / "run"
    assert read_by_all(world, recipe(corpus, 8, 8), root) == list(range(64))
    assert read_by_all(world, recipe(corpus, 12, 4, dp), root) == list(range(64, 80))
    ramp = {"start": 4, "increment": 4, "steps": 13}  # a ramp that is still at its start
    assert read_by_all(world, recipe(corpus, 13, 8, dp, batch_ramp_up=ramp), root) == list(range(80, 84))


def test_a_run_begins_with_nothing_done() -> None:
    assert not any(asdict(TrainingProgress()).values())


def test_checkpoints_of_the_first_version_tell_their_place_by_their_tokens() -> None:
    state = {"step": 8, "updates": 7, "nonfinite": 0, "tokens": 64 * SEQ, "flops": 1.0, "losses": []}
    assert TrainingProgress.read(state, seq_len=SEQ, now_seq_len=SEQ).samples == 64
    assert TrainingProgress.read({**state, "samples": 60}, seq_len=SEQ, now_seq_len=SEQ).samples == 60
    longer = TrainingProgress.read({**state, "samples": 64}, seq_len=SEQ, now_seq_len=3 * SEQ)
    assert longer.samples == 22, "64 samples are 21 and a third of three times the length: the next is whole"
