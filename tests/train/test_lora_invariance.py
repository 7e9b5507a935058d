"""Adapters on any topology: the same curves as one process has (see `test_topology_invariance`), over every step from
the second on with gradients of both factors: B begins at zero, and with it the gradient of A."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, ranks
from tests.train.test_expert_invariance import DEEPSEEK, SHARED
from tests.train.test_topology_invariance import DOCUMENTS, GPT2, OLMO2, QWEN2, QWEN3, TIED, TOLERANCE, plain, train
from tests.world import World

RATE = {"lr": 5e-3}
FP64 = {"precision": "fp64"}


def lora(raw: dict[str, Any], **lora: Any) -> dict[str, Any]:
    """The recipe with adapters."""
    return {**raw, "finetune": {"lora": {"rank": 4, "alpha": 8, **lora}}}


CASES: dict[str, dict[str, Any]] = {
    "tp2-sp-dp2-cheap": lora(
        case(2, 1, 2, sequence_parallel=True, optimizer=RATE, model=QWEN2, training={"recompute": "cheap"})
    ),
    "tp2-zero-bubble-tied": lora(
        case(2, 2, schedule="interleavedzerobubble", sequence_parallel=True, model=TIED, optimizer=RATE)
    ),
    "dp4-zero3": lora(case(1, 1, 4, zero=3, optimizer=RATE), targets=["wq", "wv", "down"]),
    "tp4-kv1": lora(case(4, model={"num_kv_heads": 1}, optimizer=RATE)),
    "tp4-kv2-sp-qwen3": lora(case(4, sequence_parallel=True, model=QWEN3, optimizer=RATE)),
    "gpt2-tp2-pp2-sp": lora(case(2, 2, sequence_parallel=True, model=GPT2, optimizer=RATE)),
    "olmo2-dp4-hsdp-zero2": lora(case(1, 1, 4, zero=2, dp_replicate=2, model=OLMO2, optimizer=RATE)),
    "cp2-tp2-sp-documents": lora(case(2, cp=2, sequence_parallel=True, optimizer=RATE, training=DOCUMENTS)),
    "cp2-tp2-zero-bubble-full": lora(
        case(2, 2, cp=2, schedule="interleavedzerobubble", optimizer=RATE, training={"recompute": "full"})
    ),
    "ulysses2-dp2-zero3-full": lora(
        case(1, 1, 2, cp=2, cp_kind="ulysses", zero=3, optimizer=RATE, training={"recompute": "full"})
    ),
    "zbv-full": lora(case(1, 2, 2, schedule="zbvzerobubble", optimizer=RATE, training={"recompute": "full"})),
    "dualpipev-tied": lora(case(1, 2, schedule="dualpipev", model=TIED, optimizer=RATE), targets=["wo", "up"]),
    "interleaved-dp2-zero0": lora(case(1, 2, 2, schedule="interleaved1f1b", zero=0, optimizer=RATE)),
    "pp2-dp2-zero3": lora(case(1, 2, 2, zero=3, optimizer=RATE)),
    "compile-tp2-sp": lora(case(2, sequence_parallel=True, optimizer=RATE, training={"compile": True})),
    "late-pp4": lora(
        case(1, 4, model={"moe": {**SHARED["moe"], "shared_ffn_hidden_size": None}}, optimizer=RATE, training=FP64),
        targets=["wo"],
    ),
    "experts-tp2-ep2": lora(case(2, 1, 2, ep=2, model=SHARED, optimizer=RATE, training=FP64)),
    "experts-shared-dp4-ep2-zero3": lora(case(1, 1, 4, ep=2, zero=3, model=DEEPSEEK, optimizer=RATE, training=FP64)),
    "fp64-tp2-pp2-dp2": lora(case(2, 2, 2, optimizer=RATE, training=FP64)),
    "fp64-tp4-sp-cp2-zero3": lora(case(4, cp=2, zero=3, sequence_parallel=True, optimizer=RATE, training=FP64)),
}
DEFAULT = {"tp2-sp-dp2-cheap", "tp2-zero-bubble-tied", "dp4-zero3"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in CASES]
)
def test_curve_is_that_of_one_process(world: World, name: str) -> None:
    raw = CASES[name]
    (reference,) = world.run(1, train, plain(raw))
    curves = world.run(ranks(raw), train, raw)
    assert all(curve == curves[0] for curve in curves), "the ranks do not agree"
    tolerance = TOLERANCE[raw["training"]["precision"]]
    for step, (ours, theirs) in enumerate(zip(curves[0], reference, strict=True), 1):
        assert ours == pytest.approx(theirs, rel=tolerance), f"step {step}"
    assert curves[0][-1][0] < curves[0][0][0], "nothing was learnt"
