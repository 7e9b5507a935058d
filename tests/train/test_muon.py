"""Muon: the update of the written reference, and the same run on any topology."""

from __future__ import annotations

from typing import Any

from tests.recipes import case
from tests.train.test_topology_invariance import GPT2

MUON = {"name": "muon", "lr": 3e-3}
FP64 = {"precision": "fp64"}

CASES: dict[str, dict[str, Any]] = {
    "tp2-dp2-zero1": case(2, 1, 2, model={"num_kv_heads": 2}),
    "tp4-kv1-sp": case(4, model={"num_kv_heads": 1}, sequence_parallel=True),
    "dp4-zero0": case(1, 1, 4, zero=0),
    "dp4-zero2": case(1, 1, 4, zero=2),
    "tp2-dp2-zero3-sp": case(2, 1, 2, zero=3, sequence_parallel=True),
    "dp4-hsdp-zero1": case(1, 1, 4, zero=1, dp_replicate=2),
    "kv2-tp4-dp2-zero3": case(4, 1, 2, zero=3),
    "pp2-dp2-interleaved": case(1, 2, 2, schedule="interleaved1f1b"),
    "tp2-pp2-zbv-sp": case(2, 2, schedule="zbvzerobubble", sequence_parallel=True),
    "gpt2-tp2-pp2-dp2": case(2, 2, 2, model=GPT2),
    "cp2-dp2-zero1": case(1, 1, 2, cp=2),
}
