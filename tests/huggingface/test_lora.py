"""Adapters that are trained beneath a Hugging Face folder: as the real PEFT reads them, merged, and in our own hands,
one model. Each family fuses other matrices, in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import MODELS, reference
from tests.recipes import ranks
from tests.training import train, trainer
from tests.world import World
from tplaunch.errors import TplaunchError
from tplaunch.huggingface.adapter import export_adapter
from tplaunch.huggingface.export import export

SEQ = 32
SOME = {"rank": 4, "alpha": 8}
# family, topology, adapters
CASES: list[Any] = [
    ("llama", {"tp": 2, "sequence_parallel": True}, {**SOME, "targets": ["wq", "wv", "wo", "down"]}),
    ("phi3", {"pp": 2}, SOME),
    ("gpt_neox", {"tp": 2}, {**SOME, "targets": ["wq", "wv", "up"]}),
    ("gpt2", {"dp": 2, "zero": 3}, {**SOME, "targets": ["wk", "wv", "wo", "up"]}),
    *(
        pytest.param(family, {"tp": 2, "dp": 2}, {**SOME, **more}, marks=pytest.mark.slow)
        for family, more in [
            *(("llama-tied", {}), ("qwen2", {}), ("gemma2", {}), ("olmo2", {}), ("mixtral", {}), ("gpt_oss", {})),
            *(("deepseek_v3", {"targets": ["wo"]}), ("deepseek_v3", {"targets": ["wo", "gate", "up", "down"]})),
        ]
    ),
]


def recipe(family: str, topology: dict[str, Any], initial: Path, lora: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "adapted",
        "model": MODELS[family],
        "topology": {"tp": 1, "pp": 1, "dp": 1, **topology},
        "training": {"seq_len": SEQ, "micro_batch_size": 2, "global_batch_size": 4, "steps": 9, "precision": "fp32"},
        "optimizer": {"lr": 2e-2},
        "data": {"train": "unused"},
        "finetune": {"lora": lora},
        "checkpoint": {"initial": str(initial)},
        "logging": {"wandb": {"mode": "disabled"}},
    }


def adapt(raw: dict[str, Any], root: str) -> list[tuple[float, float]]:
    """Train adapters for some steps, and save them."""
    made = trainer(raw, root)
    made.resume("auto")
    curve = train(made, 4)
    made.save(wait=True)
    return curve


def logits(raw: dict[str, Any], root: str, checkpoint: str, tokens: torch.Tensor) -> torch.Tensor:
    """Of the trainer's own model, with the adapters of a checkpoint."""
    made = trainer(raw, root)
    made.resume(checkpoint)
    (stage,) = made.step.stages
    with torch.no_grad():
        return stage.module.eval()(tokens)


def saved(root: Path) -> Path:
    return root / "checkpoints" / "step-00000004"


@pytest.mark.parametrize(("family", "topology", "lora"), CASES)
def test_peft_merged_and_ours_are_one_model(
    world: World, tmp_path: Path, family: str, topology: dict[str, Any], lora: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, root = tmp_path / "base", tmp_path / "run"
    reference(family).save_pretrained(folder)
    raw = recipe(family, topology, folder, lora)
    world.run(ranks(raw), adapt, raw, str(root))
    tokens = torch.randint(MODELS[family]["vocab_size"], (2, SEQ), generator=torch.Generator().manual_seed(3))
    alone = {**raw, "topology": {"tp": 1, "pp": 1, "dp": 1}}
    (ours,) = world.run(1, logits, alone, str(tmp_path / "again"), str(saved(root)), tokens)

    export(saved(root), tmp_path / "merged", precision="fp32", seq_len=SEQ, tokenizer=None)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        found = {"merged": merged(tokens).logits}
        if "gate" in lora.get("targets", ()):  # of a model with experts
            with pytest.raises(TplaunchError, match="PEFT cannot have these adapters"):
                export_adapter(saved(root), tmp_path / "adapter", precision="fp32")
        else:
            export_adapter(saved(root), tmp_path / "adapter", precision="fp32")
            found["peft"] = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(tokens).logits
    assert (ours - before).abs().max() > 1e-2, "the adapters do nothing"
    for name, theirs in found.items():
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
