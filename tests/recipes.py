"""Tiny recipes: the one builder of all tests that need a model, a topology and nothing else."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tplaunch.recipe.schema import Recipe

STEPS, BATCH, SEQ, VOCAB = 10, 8, 32, 300


def case(
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    *,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **topology: Any,
) -> dict[str, Any]:
    """A raw recipe."""
    if topology.get("schedule", "1f1b") not in ("gpipe", "1f1b"):
        topology.setdefault("virtual_stages", 2)
    return {
        "name": "case",
        "model": {
            "hidden_size": 64,
            "num_layers": 2 if pp == 1 else 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 96,
            "vocab_size": VOCAB,
            **(model or {}),
        },
        "topology": {"tp": tp, "pp": pp, "dp": dp, **topology},
        "training": {
            "seq_len": SEQ,
            "micro_batch_size": BATCH // dp // (2 if pp == 1 else 4),
            "global_batch_size": BATCH,
            "steps": STEPS,
            "precision": "fp32",
            "loss_chunk": 24,
            **(training or {}),
        },
        "optimizer": {"lr": 3e-3, **(optimizer or {})},
        "lr_schedule": {"warmup_steps": 2},
        "data": {"train": "unused"},
    }


def ranks(raw: dict[str, Any]) -> int:
    """Processes of a raw recipe."""
    topology = raw["topology"]
    return int(topology["tp"] * topology.get("cp", 1) * topology["pp"] * topology["dp"])


def resolved(raw: dict[str, Any]) -> Recipe:
    """A raw recipe as the workers read it."""
    from tplaunch.recipe.schema import Recipe
    from tplaunch.spec.resolve import resolve

    return resolve(Recipe.model_validate(raw))


def copied(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a folder in which something was trained, to change: the working directory, with its own cache."""
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
    return folder


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> Path:
    """Make a folder the working directory, with `tiny.yaml` and `text.txt` to train on, a cache of its own, no GPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TPLAUNCH_CACHE", str(folder / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (folder / "tiny.yaml").write_text(recipe)
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    return folder
