"""With equal weights, logits and every gradient equal those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import MODELS, SEQ, VOCAB, WINDOW, reference, tensors
from tests.recipes import resolved
from tests.world import World
from tplaunch.model.attend import attend

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
            "topology": {"tp": tp, "dp": 1, "sequence_parallel": sequence_parallel},
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
    assert set(named) == set(weights)
    for name, shard in named.items():
        shard.weight.copy_(mine(weights[name], name, shard.weight))
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
        assert gradient_difference <= 1e-5  # of each parameter, relative to its norm


# Split over tp as others are: what is their own, one process shows.
SPLIT_ALIKE = {"llama-mlp-bias", "phi3", "phi3-partial", "granite", "smollm3", "smollm3-window", "gpt_neox-in-turn"}
SPLITS = [(1, False), (2, False), (4, True)]


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "family"),
    [(*split, family) for split in SPLITS for family in MODELS if split == (1, False) or family not in SPLIT_ALIKE],
)
def test_equals_transformers(world: World, family: str, tp: int, sequence_parallel: bool) -> None:
    _is_small(world.run(tp, _compare, family, tp, sequence_parallel))


def _gpt_oss(kind: str) -> list[float]:
    """Relative differences of gpt-oss's attention: output, and the gradients of input, sinks and a projection."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    from tplaunch.model.block import TransformerBlock
    from tplaunch.model.rope import rope_table
    from tplaunch.parallel.mesh import Mesh

    yarn = {"factor": 32.0, "truncate": False}
    model = {
        **MODELS["llama"],
        "head_dim": 16,
        "qkv_bias": True,
        "linear_bias": True,
        "attention_sinks": True,
        "window": WINDOW,
        "window_layers": ["window", "full"],
        "rope_theta": 150_000.0,
        "rope_scaling": {"type": "yarn", "original_max_position": 32, **yarn},
    }
    raw = {
        "name": "oss",
        "model": model,
        "topology": {"dp": 1},
        "training": {"seq_len": SEQ, "global_batch_size": BATCH, "steps": 1, "precision": "fp32"},
        "data": {"train": "unused"},
    }
    recipe = resolved(raw)
    number = ["sliding", "full"].index(kind)
    ours = TransformerBlock(recipe.model, Mesh.of(recipe, torch.device("cpu")), number).attention
    config = GptOssConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        sliding_window=WINDOW,
        attn_implementation="eager",
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            **yarn,
        },
    )
    theirs = GptOssAttention(config, number)
    random = torch.Generator().manual_seed(3)
    names = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if name == "sinks" else 0.3, generator=random)
    for name, parameter in ours.named_parameters():
        module, _, which = name.rpartition(".")
        found = theirs.get_parameter(f"{names[module]}.{which}" if module else which)
        parameter.to_local().data.copy_(found.data)  # type: ignore[attr-defined]
    x = torch.randn(BATCH, SEQ, 64, generator=random)
    mine, yours = x.transpose(0, 1).contiguous().requires_grad_(), x.clone().requires_grad_()
    places = torch.arange(SEQ)
    rope = rope_table(recipe.model, places, torch.float32)
    q, k, v = ours.turn(ours.project(mine), rope)
    sinks = ours.sinks.to_local()
    out = ours.wo(attend(q, k, v, ours.how, sinks=sinks))
    ago = places[:, None] - places
    mask = torch.zeros(SEQ, SEQ).masked_fill((ago < 0) | ((ago >= WINDOW) & (kind == "sliding")), -torch.inf)
    expected, _ = theirs(yours, GptOssRotaryEmbedding(config)(yours, places[None]), mask[None, None])
    weight = torch.randn(expected.shape, generator=random)
    (out.transpose(0, 1) * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [
        (out.transpose(0, 1), expected),
        (mine.grad.transpose(0, 1), yours.grad),
        (ours.sinks.grad.to_local(), theirs.sinks.grad),
        (ours.wk.weight.grad.to_local(), theirs.k_proj.weight.grad),
    ]
    return [((one - other).norm() / other.norm()).item() for one, other in pairs]


@pytest.mark.parametrize("kind", ["sliding", "full"])
def test_attention_of_gpt_oss(world: World, kind: str) -> None:
    ((*differences,),) = world.run(1, _gpt_oss, kind)
    assert max(differences) < 1e-5


def _each(family: str) -> list[tuple[float, float]]:
    return [_compare(family, 1, False, length) for length in (WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2)]


@pytest.mark.parametrize("family", [family for family, model in MODELS.items() if "window" in model])
def test_around_the_length_of_a_window(world: World, family: str) -> None:
    """As long as the window, it changes nothing; one more, and one token is not seen."""
    (results,) = world.run(1, _each, family)
    _is_small(results)
