"""The layer with experts against transformers', on one process: output, and gradients of all that it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recipes import resolved
from tests.world import World

HIDDEN, FFN, EXPERTS, TOP, B, S = 32, 24, 8, 3, 2, 24


def smallest_gap(scores: Tensor, top: int) -> float:
    """The smallest difference between the last score or logit that is chosen and the next, of all tokens."""
    best = scores.topk(top + 1, -1).values
    return float((best[:, top - 1] - best[:, top]).min())


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=TOP
    )
    return MixtralSparseMoeBlock(config)


def _qwen3(*, normalize: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes: dict[str, Any] = {"moe_intermediate_size": FFN, "num_experts": EXPERTS, "num_experts_per_tok": TOP}
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(hidden_size=HIDDEN, norm_topk_prob=normalize, **sizes))


def _deepseek_v3() -> nn.Module:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=FFN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    return DeepseekV3MoE(config)


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=TOP)
    return GptOssMLP(config)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (_mixtral, {}),
    "qwen3_moe": (lambda: _qwen3(normalize=True), {}),
    "qwen3_moe, weights as they are": (lambda: _qwen3(normalize=False), {"normalize": False}),
    "deepseek_v3": (
        _deepseek_v3,
        {
            "router": "sigmoid",
            "scale": 2.5,
            "groups": 4,
            "top_groups": 2,
            "bias_rate": 0.0,
            "shared_ffn_hidden_size": 2 * FFN,
        },
    ),
    "gpt_oss": (_gpt_oss, {"biases": True}),
}


def _as_ours(theirs: nn.Module, of: str) -> dict[str, Tensor]:
    """Their parameters, or the gradients of these, by our names and as ours lie."""

    def take(name: str) -> Tensor:
        found = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        x = found[name]
        return x if of == "value" else x.grad  # type: ignore[return-value]

    def rows(x: Tensor) -> Tensor:  # [experts, out, in] of gate and up, or [experts, in, out] of down
        return x.flatten(0, 1)

    names = dict(theirs.named_parameters())
    router = "router" if "router.weight" in names else "gate"
    first, down = take("experts.gate_up_proj"), take("experts.down_proj")
    ours = {"router.weight": take(f"{router}.weight")}
    if "router.bias" in names:  # gpt-oss: gate and up in turn, inputs before outputs
        ours["router.bias"] = take("router.bias")
        gate, up = first[..., ::2], first[..., 1::2]
        down = down.transpose(1, 2)
        bias = take("experts.gate_up_proj_bias")
        ours |= {"experts.gate.bias": bias[:, ::2], "experts.up.bias": bias[:, 1::2]}
        ours["experts.down.bias"] = take("experts.down_proj_bias")
    else:
        gate, up = (half.transpose(1, 2) for half in first.chunk(2, 1))
    ours |= {f"experts.{name}.weight": rows(x) for name, x in (("gate", gate), ("up", up), ("down", down))}
    for name in ("gate", "up", "down"):
        if f"shared_experts.{name}_proj.weight" in names:
            ours[f"shared.{name}.weight"] = take(f"shared_experts.{name}_proj.weight")
    return ours


def _compare(kind: str) -> tuple[float, dict[str, float]]:
    """The smallest gap of a choice, and relative differences by name."""
    from tplaunch.model.moe import MoE
    from tplaunch.model.recompute import run_once
    from tplaunch.parallel.mesh import Mesh

    make, more = KINDS[kind]
    torch.manual_seed(5)
    theirs = make()
    for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
        torch.nn.init.normal_(tensor, std=0.02 if "correction" in name else 0.3)
    moe = {"experts": EXPERTS, "top_k": TOP, "ffn_hidden_size": FFN, **more}
    model = {"hidden_size": HIDDEN, "num_layers": 1, "num_heads": 4, "ffn_hidden_size": 8, "vocab_size": 64, "moe": moe}
    if kind == "gpt_oss":
        model["activation"] = "swiglu_clamped"
    raw = {"name": "moe", "model": model, "data": {"train": "unused"}}
    raw["training"] = {"seq_len": S, "global_batch_size": B, "steps": 1, "precision": "fp32"}
    recipe = resolved({**raw, "topology": {"dp": 1}})
    ours = MoE(recipe.model, Mesh.of(recipe, torch.device("cpu")))
    values = _as_ours(theirs, "value")
    assert values.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        parameter.to_local().data.copy_(values[name])  # type: ignore[attr-defined]
    if ours.router.correction is not None:
        ours.router.correction.copy_(theirs.gate.e_score_correction_bias)
    x = 2 * torch.randn(B, S, HIDDEN)  # some of gpt-oss's gates are clamped
    mine, yours = x.transpose(0, 1).contiguous().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(run_once, mine).transpose(0, 1), theirs(yours)
    expected = expected[0] if isinstance(expected, tuple) else expected
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad is not None and yours.grad is not None
    pairs = {"output": (out, expected), "input": (mine.grad.transpose(0, 1), yours.grad)}
    grads = _as_ours(theirs, "grad")
    pairs |= {name: (p.grad.to_local(), grads[name]) for name, p in ours.named_parameters()}  # type: ignore[union-attr]
    with torch.no_grad():
        gap = smallest_gap(ours.router(x.flatten(0, 1)), TOP)
        return gap, {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(world: World, kind: str) -> None:
    ((gap, differences),) = world.run(1, _compare, kind)
    if kind != "deepseek_v3":  # whose groups choose, too
        assert gap > 1e-4, "a near tie: rounding may choose another expert"
    assert differences.pop("output") <= 1e-5
    assert max(differences.values()) <= 1e-4, differences
