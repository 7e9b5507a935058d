"""The mean of checkpoints, written by any topologies; averaged weights, taken out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.recipes import case, ranks
from tests.training import batch, trainer
from tests.world import World
from tplaunch.checkpoint.average import average
from tplaunch.checkpoint.load import dtype_of, load_tensors
from tplaunch.checkpoint.metadata import read_metadata
from tplaunch.checkpoint.origin import origin_of
from tplaunch.checkpoint.store import read_manifest
from tplaunch.errors import TplaunchError
from tplaunch.huggingface.export import export

FOUR = {"num_layers": 4}
TIED = {**FOUR, "tie_embeddings": True}


def save_at(raw: dict[str, Any], root: str, steps: list[int]) -> None:
    made = trainer(raw, root)
    for _ in range(max(steps)):
        made.step.run(batch(made))
        if made.progress.step in steps:
            made.save(wait=True)


def begin_from(raw: dict[str, Any], root: str) -> dict[str, Tensor]:
    made = trainer(raw, root)
    made.resume("auto")
    return {f"model.{s.parameter.name}": s.layout.full_tensor() for st in made.step.stages for s in st.sharding.shards}


def tensors(checkpoint: Path, prefix: str = "model.") -> dict[str, Tensor]:
    stored = read_metadata(checkpoint).tensors
    found = {n: torch.empty(one.size, dtype=dtype_of(one)) for n, one in stored.items() if n.startswith(prefix)}
    load_tensors(found, checkpoint, alone=True)
    return found


@pytest.fixture(scope="module")
def written(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Steps 2 and 4 of a run on tp2, and step 2 of one of another seed on pp2."""
    root = tmp_path_factory.mktemp("runs")
    tp2 = case(2, model=TIED, training={"ema": {"decay": 0.5, "from": 3}})
    pp2 = case(1, 2, model=TIED, training={"seed": 5})
    world.run(ranks(tp2), save_at, tp2, str(root / "a"), [2, 4])
    world.run(ranks(pp2), save_at, pp2, str(root / "b"), [2])
    names = ("a/checkpoints/step-00000002", "a/checkpoints/step-00000004", "b/checkpoints/step-00000002")
    return [root / name for name in names]


def test_it_is_the_mean(world: World, tmp_path: Path, written: list[Path]) -> None:
    made = average(written, tmp_path / "mean", [1.0, 2.0, 1.0])
    parts, mean = [tensors(path) for path in written], tensors(made)
    assert mean.keys() == parts[0].keys()
    for name, tensor in mean.items():
        expected = sum(share * part[name].double() for share, part in zip((0.25, 0.5, 0.25), parts, strict=True))
        assert torch.equal(tensor, expected.float())
    manifest = read_manifest(made)
    assert [one["step"] for one in manifest.about["averaged_from"]] == [2, 4, 2]
    assert manifest.about["optimizer_state"] == []
    raw = {**case(1, 1, 2, zero=3, model=TIED), "checkpoint": {"initial": str(made)}}
    for rank in world.run(2, begin_from, raw, str(tmp_path / "run")):
        assert all(torch.equal(tensor, mean[name]) for name, tensor in rank.items())
    export(made, tmp_path / "hf", precision="fp32", seq_len=32, tokenizer=None)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["model.norm.weight"], mean["model.norm.weight"])


def test_others_are_refused_and_nothing_is_written(world: World, tmp_path: Path, written: list[Path]) -> None:
    other = case(model={"num_layers": 1, "ffn_hidden_size": 32})
    world.run(1, save_at, other, str(tmp_path / "run"), [1])
    with pytest.raises(TplaunchError, match=r"model\.num_layers=1") as caught:
        average([written[0], tmp_path / "run/checkpoints/step-00000001"], tmp_path / "mean")
    assert "model.ffn_hidden_size=32" in str(caught.value)
    assert not (tmp_path / "mean").exists()


def test_averaged_weights_are_taken_out(tmp_path: Path, written: list[Path]) -> None:
    origin = origin_of(written[1], ema=True)
    export(origin.checkpoint, tmp_path / "hf", precision="fp32", seq_len=32, tokenizer=None, ema=True)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    averages, weights = tensors(written[1], "ema."), tensors(written[1])
    assert torch.equal(exported["model.norm.weight"], averages["ema.norm.weight"])
    assert len(averages) == len(weights), "a tied matrix is there once"
    with pytest.raises(TplaunchError, match="averages had not begun"):
        origin_of(written[0], ema=True)
    with pytest.raises(TplaunchError, match=r"without training\.ema"):
        origin_of(written[2], ema=True)
