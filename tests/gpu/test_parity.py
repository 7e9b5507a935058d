"""A model of transformers, imported, in bf16: as near to its own fp32 self here as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.machine import choose, take_device
from tests.training import trainer
from tests.world import World
from tplaunch.cli.main import run
from tplaunch.errors import Exit
from tplaunch.recipe.load import load_recipe

pytestmark = pytest.mark.gpu
HIDDEN, LAYERS, SEQ, VOCAB = choose((1024, 8, 1024, 8192), (128, 2, 64, 512))


def save_reference(folder: Path) -> None:
    """A Llama with random weights, as transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64 * 2,
        num_key_value_heads=HIDDEN // 64,
        initializer_range=0.05,
        max_position_embeddings=SEQ,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def compare(raw: dict[str, Any], folder: str, root: str) -> dict[str, float]:
    """Errors of logits (root mean square, relative to those of fp32) and losses, of a rank."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaForCausalLM

    device = take_device()
    made = trainer(raw, root, device)
    made.resume("auto")
    (stage,) = made.step.stages
    data = torch.randint(0, VOCAB, (2, SEQ + 1), generator=torch.Generator().manual_seed(1)).to(device)
    tokens, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    with torch.no_grad():
        ours = stage.module(tokens).float()[..., :VOCAB]
        our_loss = float(stage.module(tokens, labels, loss_scale=1 / labels.numel()).sum())
        exact, theirs = (
            LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device)(tokens).logits.float()
            for dtype in (torch.float32, torch.bfloat16)
        )
        loss = float(cross_entropy(exact.flatten(0, 1), labels.flatten()))
    size = exact.square().mean().sqrt()
    error, their_error = (float((x - exact).square().mean().sqrt() / size) for x in (ours, theirs))
    return {"error": error, "transformers_error": their_error, "loss": our_loss, "fp32_loss": loss}


def test_bf16_is_as_near_to_fp32_as_transformers(tmp_path: Path, world: World, note: Callable[..., None]) -> None:
    save_reference(tmp_path / "theirs")
    assert run(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == Exit.DONE
    described = tmp_path / "ours" / "model.yaml"
    described.write_text(
        described.read_text()
        + f"\nname: parity\ntraining: {{seq_len: {SEQ}, global_batch_size: 2, steps: 1, precision: bf16}}"
        + "\ndata: {train: unused}\n"
    )
    recipe = load_recipe(described).recipe
    raw = {
        "name": "parity",
        "model": recipe.model.model_dump(),
        "topology": {"dp": 1},
        "training": {"seq_len": SEQ, "micro_batch_size": 2, "global_batch_size": 2, "steps": 1, "precision": "bf16"},
        "checkpoint": {"initial": recipe.checkpoint.initial},
        "data": {"train": "unused"},
        "logging": {"wandb": {"mode": "disabled"}},
    }
    (found,) = world.run(1, compare, raw, str(tmp_path / "theirs"), str(tmp_path / "run"))
    note(**found)
    assert 0 < found["error"] < 1.5 * found["transformers_error"]
    assert found["loss"] == pytest.approx(found["fp32_loss"], rel=2e-3)
