"""Predicted bytes against counted ones on real gloo worlds, and the planner's memory against what papers say of it.

Norms are LayerNorms here: RMSNorm's backward pass on the CPU makes more temporaries than the one kernel that GPUs run,
for which the planner counts. (What a block keeps is tested to the byte, with both, in `tests/model/test_recompute.py`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tplaunch.plan.case import Case
from tplaunch.plan.estimate import estimate
from tplaunch.plan.memory import Memory
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.gpu import GPUS
from tplaunch.spec.resolve import resolve

if TYPE_CHECKING:
    from tests.world import World


def values(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    microbatches: int = 4,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    lora: dict[str, Any] | None = None,
    **topology: Any,
) -> dict[str, Any]:
    """A small model on any topology, as a recipe."""
    sizes = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 704}
    run = {"seq_len": 256, "global_batch_size": microbatches * dp, "steps": 2, "precision": "fp32", "loss_chunk": 128}
    return {
        "name": "test",
        "model": {**sizes, "vocab_size": 2048, "norm": "layernorm", **(model or {})},
        "topology": {"tp": tp, "pp": pp, "dp": dp, **topology},
        "training": {**run, **(training or {})},
        "optimizer": {"name": optimizer},
        "finetune": {"lora": lora},
        "data": {"train": "data/train"},
    }


def memory(recipe: dict[str, Any], gpu: str = "h100-80gb") -> list[Memory]:
    parsed = Recipe.model_validate(recipe)
    return estimate(Case(resolve(parsed), GPUS[gpu])).memory


GPT = {"activation": "gelu", "position": "learned", "max_position": 256, "qkv_bias": True, "linear_bias": True}
OLMO2 = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_all_heads": True}
MIXTURE = {"experts": 8, "top_k": 2, "ffn_hidden_size": 128}
EXPERTS = {"hidden_size": 128, "ffn_hidden_size": 256, "vocab_size": 512, "moe": MIXTURE}
DEEPSEEK = {
    **EXPERTS,
    "num_kv_heads": 8,
    "latent": {"q_rank": 48, "kv_rank": 32, "nope_dim": 16, "rope_dim": 8, "value_dim": 16},
    "moe": {
        **MIXTURE,
        "shared_ffn_hidden_size": 128,
        "dense_layers": 1,
        "router": "sigmoid",
        "bias_rate": 0.001,
        "aux_loss": 0.001,
    },
}
INTERLEAVED = {"schedule": "interleaved1f1b", "virtual_stages": 2}
ZERO_BUBBLE = {"pp": 2, "schedule": "zbvzerobubble", "virtual_stages": 2, "microbatches": 8}
MEASURED: dict[str, dict[str, Any]] = {
    "alone": {},
    "alone, one microbatch": {"microbatches": 1},
    "alone, bf16": {"training": {"precision": "bf16"}},
    "alone, recompute full": {"training": {"recompute": "full"}},
    "alone, recompute every 2": {"training": {"recompute": {"every": 2}}},
    "alone, cheap": {"training": {"recompute": "cheap"}},
    "alone, bf16, cheap": {"training": {"precision": "bf16", "recompute": "cheap"}},
    "alone, again core": {"training": {"recompute": {"again": ["core_attention"]}}},
    "alone, again gate_up": {"training": {"recompute": {"again": ["norm", "gate_up", "activation"]}}},
    "alone, save gate_up": {"training": {"recompute": {"save": ["gate_up"]}}},
    "norms of heads, cheap": {"model": {"qk_norm": True}, "training": {"recompute": "cheap"}},
    "norms after alone": {"model": OLMO2},
    "norms after alone, cheap": {"model": OLMO2, "training": {"recompute": "cheap"}},
    "side by side": {"model": {"parallel_residual": True, "norm": "layernorm", "activation": "gelu_exact"}},
    "gpt": {"model": GPT},
    "tp 2": {"tp": 2},
    "tp 2, sp": {"tp": 2, "sequence_parallel": True},
    "tp 2, sp, cheap": {"tp": 2, "sequence_parallel": True, "training": {"recompute": "cheap"}},
    "tp 4, fewer kv heads": {"tp": 4, "sequence_parallel": True, "model": {"num_kv_heads": 2}},
    "dp 2, zero 0": {"dp": 2, "zero": 0},
    "dp 2, zero 1": {"dp": 2, "zero": 1},
    "dp 2, zero 2": {"dp": 2, "zero": 2},
    "dp 2, zero 3": {"dp": 2, "zero": 3},
    "dp 4, hsdp": {"dp": 4, "zero": 1, "dp_replicate": 2},
    "pp 2": {"pp": 2},
    "pp 2, gpipe": {"pp": 2, "schedule": "gpipe"},
    "pp 2, tied": {"pp": 2, "model": {"tie_embeddings": True}},
    "pp 2, interleaved": {"pp": 2, **INTERLEAVED},
    "pp 2, interleaved zero bubble": {
        "pp": 2,
        "schedule": "interleavedzerobubble",
        "virtual_stages": 2,
        "microbatches": 8,
    },
    "pp 2, zbv": ZERO_BUBBLE,
    "pp 2, zbv, cheap": {**ZERO_BUBBLE, "training": {"recompute": "cheap"}},
    "pp 2, zbv, recompute full": {**ZERO_BUBBLE, "training": {"recompute": "full"}},
    "tp 2, pp 2, sp, zbv": {**ZERO_BUBBLE, "tp": 2, "sequence_parallel": True},
    "pp 2, dualpipev": {"pp": 2, "schedule": "dualpipev", "virtual_stages": 2, "microbatches": 8},
    "pp 4": {"pp": 4},
    "pp 2, dp 2, zero 2": {"pp": 2, "dp": 2, "zero": 2},
    "pp 2, dp 2, zero 3": {"pp": 2, "dp": 2, "zero": 3},
    "tp 2, pp 2, sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp 2, dp 2, sp, zero 3": {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 3},
    "tp 2, pp 2, dp 2": {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True, **INTERLEAVED},
    "muon": {"optimizer": "muon"},
    "tp 2, dp 2, muon": {"tp": 2, "dp": 2, "sequence_parallel": True, "optimizer": "muon"},
    "dp 4, zero 0, muon": {"dp": 4, "zero": 0, "optimizer": "muon"},
    "tp 2, pp 2, dp 2, zero 3, muon": {"tp": 2, "pp": 2, "dp": 2, "zero": 3, "optimizer": "muon"},
}


def experts(
    model: dict[str, Any], recompute: Any = "none", precision: str = "fp32", seq_len: int = 1024, **more: Any
) -> dict[str, Any]:
    """A mixture whose activations weigh more than its weights."""
    return {"model": model, "training": {"seq_len": seq_len, "precision": precision, "recompute": recompute}, **more}


DUALPIPE = {"pp": 2, "schedule": "dualpipev", "virtual_stages": 2, "microbatches": 8}
MEASURED |= {
    "experts": experts(EXPERTS),
    "experts, bf16": experts(EXPERTS, precision="bf16"),
    "experts, cheap": experts(EXPERTS, "cheap"),
    "experts, again dispatch": experts(EXPERTS, {"again": ["dispatch", "activation"]}),
    "experts, recompute full": experts(EXPERTS, "full"),
    "deepseek": experts(DEEPSEEK),
    "deepseek, bf16, cheap": experts(DEEPSEEK, "cheap", "bf16"),
    "experts, dp 2, ep 2": experts(EXPERTS, dp=2, ep=2),
    "experts, dp 2, zero 0": experts(EXPERTS, dp=2, zero=0),
    "experts, dp 2, zero 2": experts(EXPERTS, dp=2, zero=2),
    "experts, dp 4, ep 2, zero 3": experts(EXPERTS, dp=4, ep=2, zero=3),
    "experts, dp 2, expert_tp 2": experts(EXPERTS, dp=2, expert_tp=2),
    "experts, tp 2, ep 2": experts(EXPERTS, tp=2, ep=2),
    "deepseek, tp 2, sp, dp 2, ep 4": experts(DEEPSEEK, tp=2, dp=2, ep=4, sequence_parallel=True),
    "deepseek, pp 2, dp 2, ep 2": experts(DEEPSEEK, pp=2, dp=2, ep=2),
    "experts, pp 2, dualpipev": experts(EXPERTS, **DUALPIPE),
    "deepseek, pp 2, zbv": experts(DEEPSEEK, **ZERO_BUBBLE),
}
ALL, FEW, MLP = {"rank": 8}, {"rank": 8, "targets": ["wq", "wv"]}, {"rank": 8, "targets": ["gate", "up", "down"]}
ADAPTED = {
    "adapters": {"lora": ALL},
    "few adapters, bf16": {"lora": FEW, "training": {"precision": "bf16"}},
    "adapters, bf16, dp 2, zero 1": {"lora": ALL, "dp": 2, "training": {"precision": "bf16"}},
    "adapters, bf16, dp 2, zero 2": {"lora": ALL, "dp": 2, "zero": 2, "training": {"precision": "bf16"}},
    "adapters, bf16, dp 2, zero 3": {"lora": ALL, "dp": 2, "zero": 3, "training": {"precision": "bf16"}},
    "adapters, dp 2, zero 0, cheap": {"lora": ALL, "dp": 2, "zero": 0, "training": {"recompute": "cheap"}},
    "few adapters, tp 2, sp": {"lora": FEW, "tp": 2, "sequence_parallel": True},
    "adapters, pp 2, dp 2": {"lora": ALL, "pp": 2, "dp": 2},
    "adapters, pp 2, zbv": {"lora": ALL, **ZERO_BUBBLE},
    "few adapters, pp 2, zbv": {"lora": FEW, **ZERO_BUBBLE},
    "adapters of the mlp": {"lora": MLP},
    "adapters of the mlp, pp 2, cheap": {"lora": MLP, "pp": 2, "training": {"recompute": "cheap"}},
    # SwiGLU of experts works on pieces of a fixed size on a CPU, which the planner does not count: long sequences.
    "adapters, experts": {"lora": ALL, **experts(EXPERTS, seq_len=4096)},
    "adapters, deepseek": {"lora": ALL, **experts(DEEPSEEK, seq_len=4096)},
    "adapters, deepseek, pp 2, zbv": {"lora": ALL, **experts(DEEPSEEK, seq_len=4096, **ZERO_BUBBLE)},
}
MEASURED |= ADAPTED


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_bytes_held_are_the_predicted_ones(world: World, name: str) -> None:
    from tests.measure import measure

    recipe = values(**MEASURED[name])
    tp, pp, dp = (recipe["topology"][axis] for axis in ("tp", "pp", "dp"))
    counted = world.run(tp * pp * dp, measure, recipe)
    for pp_rank, predicted in enumerate(memory(recipe)):
        held = counted[pp_rank * tp * dp]
        error = predicted.allocated / held["peak"] - 1
        print(f"{name:<32} pp rank {pp_rank}: {held['peak']:>12,} predicted {predicted.allocated:>12,.0f} {error:+.1%}")
        assert predicted.weights == held["weights"]
        assert predicted.optimizer == held["optimizer"]
        assert abs(error) < 0.05


def test_frozen_weights_have_no_averages() -> None:
    (without,), (averaged,) = (memory(values(lora=ALL, training={"ema": ema})) for ema in (None, {"decay": 0.9}))
    assert averaged.optimizer - without.optimizer == without.optimizer / 2 == without.gradients
    assert averaged.weights == without.weights


def test_zero_divides_what_its_paper_says() -> None:
    """Rajbhandari et al. 2020, table 1: optimizer state (with the wide weights) by dp from stage 1, gradients from 2,
    weights from 3. Their K = 12 bytes are the wide weight and two moments."""
    held = [memory(values(dp=8, zero=zero, training={"precision": "bf16"}))[0] for zero in range(4)]
    whole = held[0].weights
    assert [m.weights / whole for m in held] == pytest.approx([1, 1 / 8, 1 / 8, 1 / 8])
    assert [m.optimizer / whole for m in held] == pytest.approx([2, 1 / 4, 1 / 4, 1 / 4])
    assert [m.gradients / whole for m in held] == pytest.approx([1, 1, 1 / 8, 1 / 8])
    assert [m.gathered_weights / whole for m in held[:3]] == pytest.approx([0.5, 0.5, 0.5])
    assert held[3].gathered_weights < held[2].gathered_weights / 1.5


def test_sequence_parallelism_and_recomputation_save_what_their_paper_says() -> None:
    long = {"seq_len": 4096, "global_batch_size": 4, "precision": "bf16"}

    def held(recompute: str, *, sequence_parallel: bool) -> float:
        recipe = values(tp=4, training={**long, "recompute": recompute}, sequence_parallel=sequence_parallel)
        return memory({**recipe, "model": {**recipe["model"], "num_layers": 32}})[0].activations

    assert held("none", sequence_parallel=True) < held("none", sequence_parallel=False)
    # Recomputed in full, only the blocks' inputs are kept: 1/tp of them with sequence parallelism.
    ratio = held("full", sequence_parallel=False) / held("full", sequence_parallel=True)
    assert 2.5 < ratio <= 4.0
    assert held("full", sequence_parallel=False) < held("none", sequence_parallel=False) / 5


def test_first_pipeline_rank_is_the_fullest_under_1f1b() -> None:
    activations = [m.activations for m in memory(values(pp=4, microbatches=8, model={"num_layers": 16}))]
    assert activations[0] == max(activations)
    assert activations[0] > 1.2 * activations[2]
