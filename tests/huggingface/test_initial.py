"""`checkpoint.initial` as a Hugging Face folder: the same weights, bit for bit, as by way of an import, and of the
files each rank reads its own slices alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import LAYERS, MODELS, SEQ, reference
from tests.recipes import ranks
from tests.training import train, trainer
from tests.world import World
from tplaunch.huggingface.folder import import_folder

# family, topology, whether tensors of the files are in bf16
CASES: list[Any] = [
    ("llama", {}, False),
    ("llama-tied", {"pp": 2, "tp": 2}, False),  # whose last stage has a copy of the embedding
    ("phi3", {"tp": 2, "dp": 2, "zero": 3}, True),
    ("gpt_neox", {"tp": 2, "dp": 2}, True),
    ("gpt2", {"tp": 2}, False),
    ("gpt_oss", {"tp": 2, "ep": 2, "expert_tp": 1}, False),
    ("deepseek_v3", {"tp": 2, "pp": 2, "ep": 2}, False),
    *(
        pytest.param(
            family, {"tp": 2, "dp": 2, "zero": zero, "ep": ep, "expert_tp": expert_tp}, False, marks=pytest.mark.slow
        )
        for family, zero, ep, expert_tp in [
            *(("mixtral", 1, 4, 1), ("qwen3_moe", 2, 2, 2), ("gpt_oss", 3, 2, 2), ("gemma3", 3, 1, 2)),
            *(("qwen2", 0, 1, 2), ("olmo2", 1, 1, 2), ("gpt_neox", 3, 1, 2), ("gpt2", 3, 1, 2)),
        ]
    ),
]


def recipe(family: str, topology: dict[str, Any], initial: Path, **model: Any) -> dict[str, Any]:
    return {
        "name": "on",
        "model": {**MODELS[family], **model},
        "topology": {"tp": 1, "pp": 1, "dp": 1, **topology},
        "training": {"seq_len": SEQ, "micro_batch_size": 2, "global_batch_size": 8, "steps": 9, "precision": "fp32"},
        "data": {"train": "unused"},
        "checkpoint": {"initial": str(initial)},
        "logging": {"wandb": {"mode": "disabled"}},
    }


def weights(raw: dict[str, Any], root: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What this rank holds of each parameter at the start, and how many bytes it read of safetensors at a time."""
    read: list[int] = []

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(before(fd, buffers, offset))
        assert os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors")
        return read[-1]

    made = trainer(raw, root)
    before, os.preadv = os.preadv, counting
    try:
        made.resume("auto")
    finally:
        os.preadv = before
    named = dict(made.checkpoints.tensors())
    return {
        name: (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()
        for name, tensor in named.items()
        if name.startswith("model.")
    }, read


def compare(by_folder: dict[str, Any], by_import: dict[str, Any], root: str) -> tuple[int, list[int]]:
    """Bytes of fp32 weights that this rank holds, and what it read of the folder at a time."""
    found, read = weights(by_folder, f"{root}/a")
    expected, none = weights(by_import, f"{root}/b")
    assert not none and found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    return sum(tensor.nbytes for tensor in found.values()), read


@pytest.mark.parametrize(("family", "topology", "narrow"), CASES)
def test_each_rank_reads_its_slices(
    tmp_path: Path, world: World, family: str, topology: dict[str, Any], narrow: bool
) -> None:
    model = reference(family)
    (model.to(torch.bfloat16) if narrow else model).save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours").checkpoint
    raw, other = recipe(family, topology, tmp_path / "theirs"), recipe(family, topology, imported)
    files = sum(path.stat().st_size for path in (tmp_path / "theirs").glob("*.safetensors"))
    padding = 4 * 84 * MODELS[family]["hidden_size"] * 2  # at most, of two tables with 300 of 384 rows
    for held, read in world.run(ranks(raw), compare, raw, other, str(tmp_path)):
        own = held // 2 if narrow else held
        in_turn = 2 if family == "gpt_oss" else 1  # experts' gate and up lie number by number beside each other
        assert own - padding <= sum(read) <= in_turn * own
        assert sum(read) < files or topology == {}
        assert max(read) <= in_turn * files // 4  # one tensor's slice


def test_vocabulary_is_padded_as_the_recipe_says(tmp_path: Path, world: World) -> None:
    reference("llama").save_pretrained(tmp_path / "theirs")
    raw = recipe("llama", {"tp": 2}, tmp_path / "theirs", make_vocab_size_divisible_by=32)
    whole = reference("llama").get_input_embeddings().weight
    parts = [found["model.embedding.weight"] for found, _ in world.run(2, weights, raw, str(tmp_path / "run"))]
    assert torch.equal(torch.cat(parts)[:300], whole)
    assert torch.cat(parts).shape[0] == 320 and not torch.cat(parts)[300:].any()


def outcome(raw: dict[str, Any], root: str) -> str:
    from tplaunch.errors import TplaunchError

    try:
        trainer(raw, root).resume("auto")
    except TplaunchError as error:
        return str(error)
    return ""


def test_numbers_that_are_not_finite_are_refused_by_all_ranks(tmp_path: Path, world: World) -> None:
    model = reference("llama")
    with torch.no_grad():
        model.model.layers[LAYERS - 1].mlp.down_proj.weight[0, 0] = float("nan")  # of the second stage, and tp rank 0
    model.save_pretrained(tmp_path / "theirs")
    raw = recipe("llama", {"tp": 2, "pp": 2}, tmp_path / "theirs")
    said = world.run(4, outcome, raw, str(tmp_path / "run"))
    assert len(set(said)) == 1 and f"1 of model.layers.{LAYERS - 1}.mlp.down_proj.weight" in said[0]
    assert "checkpoint.initial" in said[0]


def begin(raw: dict[str, Any], root: str) -> list[tuple[float, float]]:
    made = trainer(raw, root)
    made.resume("auto")
    return train(made, 2)


def test_training_from_a_folder_is_the_same_on_any_topology(tmp_path: Path, world: World) -> None:
    reference("mixtral").save_pretrained(tmp_path / "theirs")
    curves = [
        world.run(ranks(raw), begin, raw, str(tmp_path / f"run-{number}"))[0]
        for number, topology in enumerate(({}, {"tp": 2, "pp": 2, "ep": 2}))
        for raw in [recipe("mixtral", topology, tmp_path / "theirs")]
    ]
    assert curves[0] == [pytest.approx(pair, rel=1e-5) for pair in curves[1]]
    events = [json.loads(line) for line in (tmp_path / "run-1/events.jsonl").read_text().splitlines()]
    assert [(one["event"], one["path"]) for one in events] == [("initial", str(tmp_path / "theirs"))]
