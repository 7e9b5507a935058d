"""With equal weights, logits and every gradient equal those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import MODELS, SEQ, VOCAB, WINDOW, reference, tensors
from tests.recipes import resolved
from tests.world import World

BATCH = 2


def _compare(family: str, tp: int, sequence_parallel: bool, length: int = SEQ) -> tuple[float, float]:
    """Largest absolute difference of logits, and largest relative one of a parameter's gradient; on each rank."""
    from tplaunch.model.build import build_stages
    from tplaunch.optim.gradients import GradientFinalizer
    from tplaunch.parallel.mesh import Mesh

    recipe = resolved(
        {
            "name": "parity",
            "model": MODELS[family],
            "topology": {"tp": tp, "dp": 1, "sequence_parallel": sequence_parallel, "zero": 0},
            "training": {
                "seq_len": length,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "steps": 1,
                "precision": "fp32",
                "loss_chunk": 50,
            },
            "data": {"train": "unused"},
        }
    )
    mesh = Mesh.of(recipe, torch.device("cpu"))
    (stage,) = build_stages(recipe, mesh)

    def mine(whole: torch.Tensor, name: str, slice_: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a whole tensor, padded rows zero."""
        parameter = stage.parameters[name]
        if whole.shape != parameter.shape:
            whole = torch.cat([whole, whole.new_zeros(parameter.shape[0] - VOCAB, whole.shape[1])])
        if parameter.tp_dim is None:
            return whole
        size = slice_.shape[parameter.tp_dim]
        return whole.narrow(parameter.tp_dim, mesh.tp.rank // parameter.copies(tp) * size, size)

    model = reference(family)
    weights = tensors(model, family)
    named = {shard.name: shard for shard in stage.sharding.shards}
    buffers = dict(stage.module.named_buffers())
    assert set(named) | buffers.keys() == set(weights)
    for name, shard in named.items():
        shard.weight.copy_(mine(weights[name], name, shard.weight))
    for name, buffer in buffers.items():
        buffer.copy_(weights[name])
    stage.sharding.publish()

    data = torch.randint(0, VOCAB, (BATCH, length + 1), generator=torch.Generator().manual_seed(1))
    tokens, labels = data[:, :-1], data[:, 1:].contiguous()
    expected = model(tokens).logits
    with torch.no_grad():
        logit_difference = (stage.module(tokens) - expected).abs().max().item()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    stage.module(tokens, labels, loss_scale=1.0 / labels.numel()).backward()
    GradientFinalizer([stage], mesh, schedule="1f1b", num_stages=1, tied=False).complete()
    gradients = tensors(model, family, grad=True)
    # A floor, for gradients that are zero but for rounding: GPT-2's key bias shifts all scores of a row alike.
    floor = 1e-3 * torch.stack([gradients[name].norm() for name in named]).norm()
    worst = 0.0
    for name, shard in named.items():
        ours = stage.sharding.gradient(shard)
        theirs = mine(gradients[name], name, ours)
        worst = max(worst, ((ours - theirs).norm() / gradients[name].norm().clamp_min(floor)).item())
    return logit_difference, worst


def _is_small(results: list[Any]) -> None:
    for logit_difference, gradient_difference in results:
        assert logit_difference <= 1e-5
        assert gradient_difference <= 2e-5  # of each parameter, relative to its norm


# Split over tp as others are: what is their own, one process shows.
SPLIT_ALIKE = {"llama-mlp-bias", "phi3", "phi3-partial", "granite", "smollm3", "smollm3-window", "gpt_neox-in-turn"}
SPLIT_ALIKE |= {"mixtral-window", "qwen3_moe-dense-first", "deepseek_v3-whole-queries"}
SPLITS = [(1, False), (2, False), (4, True)]


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "family"),
    [(*split, family) for split in SPLITS for family in MODELS if split == (1, False) or family not in SPLIT_ALIKE],
)
def test_equals_transformers(world: World, family: str, tp: int, sequence_parallel: bool) -> None:
    _is_small(world.run(tp, _compare, family, tp, sequence_parallel))


def _each(family: str) -> list[tuple[float, float]]:
    return [_compare(family, 1, False, length) for length in (WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2)]


@pytest.mark.parametrize("family", [family for family, model in MODELS.items() if "window" in model])
def test_around_the_length_of_a_window(world: World, family: str) -> None:
    """As long as the window, it changes nothing; one more, and one token is not seen."""
    (results,) = world.run(1, _each, family)
    _is_small(results)
