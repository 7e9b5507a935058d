"""Any topology, the same run: curves of loss and gradient norm against those of one process.

Each case trains the real trainer's steps in a small gloo world. The reference is the same recipe as 1 x 1 x 1, without
sequence parallelism, recomputation, compilation or sharding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.recipes import BATCH, SEQ, STEPS, VOCAB, case, ranks, resolved
from tests.world import World

if TYPE_CHECKING:
    import torch

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-9}
GPT2 = {
    "num_kv_heads": 4,
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "max_position": SEQ,
    "qkv_bias": True,
    "linear_bias": True,
    "tie_embeddings": True,
}
QWEN3 = {"qk_norm": True, "head_dim": 32}
QWEN2 = {"qkv_bias": True}
OLMO2 = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_all_heads": True}
TIED = {"tie_embeddings": True}
# As wide as real models, where sums are long: fp32 sums of a gradient's squares would be 1e-3 off.
WIDE = {"model": {"hidden_size": 768, "num_heads": 12, "num_layers": 1, "ffn_hidden_size": 768, "vocab_size": 32_000}}
DOCUMENTS = {"document_mask": True, "eod_mask_loss": True}
WINDOWS = {"window": 6, "window_layers": ["full", "window"]}
LATENT = {
    "num_kv_heads": 4,
    "latent": {"q_rank": 24, "kv_rank": 16, "nope_dim": 12, "rope_dim": 8, "value_dim": 10},
}
WHOLE_QUERIES = {**LATENT, "latent": {**LATENT["latent"], "q_rank": None}}  # type: ignore[dict-item]
FEW = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 1}


CASES: dict[str, dict[str, Any]] = {
    "tp2": case(2),
    "tp4-sp-cheap": case(4, sequence_parallel=True, training={"recompute": "cheap"}),
    "pp2-gpipe": case(1, 2, schedule="gpipe"),
    "pp4-cheap": case(1, 4, training={"recompute": "cheap"}),
    "pp2-uneven": case(1, 2, stage_layers=[3, 1]),
    "dp4-zero0": case(1, 1, 4, zero=0),
    "dp4-zero1": case(1, 1, 4, zero=1),
    "dp4-zero2": case(1, 1, 4, zero=2),
    "dp4-zero3-save-core": case(1, 1, 4, zero=3, training={"recompute": {"save": ["core_attention"]}}),
    "dp4-hsdp": case(1, 1, 4, zero=3, dp_replicate=2),
    "tp2-pp2-dp2": case(2, 2, 2),
    "tp2-pp2-dp2-sp-tied": case(2, 2, 2, sequence_parallel=True, model=TIED),
    "tp2-dp2-zero3-full": case(2, 1, 2, zero=3, training={"recompute": "full"}),
    "pp2-dp2-zero2": case(1, 2, 2, zero=2),
    "pp2-dp2-zero3": case(1, 2, 2, zero=3),
    "tp2-pp2-dp2-hsdp-zero0": case(2, 2, 2, zero=0, sequence_parallel=True),
    "interleaved": case(2, 2, schedule="interleaved1f1b", sequence_parallel=True),
    "interleaved-4": case(1, 2, 2, schedule="interleaved1f1b", virtual_stages=4, model={"num_layers": 8}),
    "interleaved-zero3": case(1, 2, 2, schedule="interleaved1f1b", zero=3),
    "zero-bubble": case(1, 2, 2, schedule="interleavedzerobubble"),
    "zero-bubble-core-again": case(
        2,
        2,
        schedule="interleavedzerobubble",
        sequence_parallel=True,
        training={"recompute": {"again": ["core_attention"]}},
    ),
    "zbv-tied": case(1, 2, schedule="zbvzerobubble", model=TIED),
    "zbv-tp-full": case(2, 2, schedule="zbvzerobubble", training={"recompute": "full"}),
    "dualpipev": case(1, 2, 2, schedule="dualpipev"),
    "dualpipev-every-2": case(2, 2, schedule="dualpipev", training={"recompute": {"every": 2}}),
    "kv1-tp4": case(4, model={"num_kv_heads": 1}),
    "kv2-tp4-dp2-zero3-sp": case(4, 1, 2, zero=3, sequence_parallel=True),
    "kv1-tp2-pp2-biased": case(2, 2, model={"num_kv_heads": 1, "qkv_bias": True}),
    "gpt2-tp2-pp2-sp": case(2, 2, sequence_parallel=True, model=GPT2),
    "gpt2-tp4-dp2": case(4, 1, 2, model=GPT2, zero=0),
    "qwen3-tp4-dp2": case(4, 1, 2, model=QWEN3),
    "qwen3-kv2-tp4-sp-cheap": case(4, sequence_parallel=True, model=QWEN3, training={"recompute": "cheap"}),
    "olmo2-kv2-tp4-sp-cheap-scalars": case(
        4,
        sequence_parallel=True,
        model={**OLMO2, "rope_layers": ["rope", "none"], "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
        | {"logit_divisor": 2.0},
        training={"recompute": "cheap"},
    ),
    "fp64-side-by-side-tp2-zero-bubble": case(
        2,
        2,
        schedule="interleavedzerobubble",
        model={"parallel_residual": True, "rotary_fraction": 0.5, "norm": "layernorm", "qkv_bias": True},
        training={"precision": "fp64"},
    ),
    "qwen2-tp2-pp2": case(2, 2, model=QWEN2),
    "z-loss": case(2, 1, 2, zero=2, training={"z_loss": 1e-3}),
    "documents": case(2, 2, 2, sequence_parallel=True, training={"document_mask": True, "eod_mask_loss": True}),
    "documents-gpt2-kv": case(4, 1, 2, sequence_parallel=True, model=GPT2, training={"document_mask": True}),
    "documents-pp4-full": case(1, 4, 2, training={"document_mask": True, "recompute": "full"}),
    "documents-windows": case(
        2,
        1,
        2,
        zero=3,
        sequence_parallel=True,
        model={"window": SEQ // 4, "window_layers": ["window", "full"]},
        training={"document_mask": True},
    ),
    "sinks-soft-caps": case(
        2,
        2,
        schedule="interleavedzerobubble",
        model={"attention_sinks": True, "attention_softcap": 2.0, "logit_softcap": 4.0, "window": SEQ // 2},
    ),
    "batch-ramp-up": case(
        1,
        2,
        2,
        training={"batch_ramp_up": {"start": 4, "increment": 2, "steps": 3}},
        optimizer={"lr": 1e-3},  # at 3e-3 rounding grows a thousandfold from step 8 to 10, on one process too
    ),
    "schedules-in-tokens": case(
        2,
        1,
        2,
        training={
            "steps": None,
            "tokens": STEPS * BATCH * SEQ - 12 * SEQ,
            "batch_schedule": [{"size": 4, "until": f"{9 * SEQ} tokens"}],
        },
        optimizer={"lr": 1e-3, "weight_decay_schedule": [{"kind": "linear", "from": 0.02, "to": 0.1}]},
    ),
    "documents-hsdp": case(1, 1, 4, zero=3, dp_replicate=2, training={"eod_mask_loss": True}),
    "sgd": case(2, 1, 2, optimizer={"name": "sgd", "momentum": 0.9}),
    "compile-tp2-sp": case(2, sequence_parallel=True, training={"compile": True}),
    "compile-dp2-cheap": case(1, 1, 2, training={"compile": True, "recompute": "cheap"}),
    "wide-tp2": case(2, training=FEW, **WIDE),
    "wide-dp2": case(1, 1, 2, training=FEW, **WIDE),
    "fp64-tp4-dp2-sp": case(4, 1, 2, sequence_parallel=True, training={"precision": "fp64"}),
    "fp64-tp2-pp2-dp2-zero3": case(2, 2, 2, zero=3, training={"precision": "fp64"}),
    "fp64-pp4-zbv-tied": case(
        1, 4, 2, schedule="zbvzerobubble", model={**TIED, "num_layers": 8}, training={"precision": "fp64"}
    ),
    "fp64-gpt2-tp2-pp2": case(2, 2, model=GPT2, training={"precision": "fp64"}),
    "cp2-tp2-pp2-sp-documents-windows": case(
        2, 2, cp=2, sequence_parallel=True, model=WINDOWS, training={**DOCUMENTS, "steps": 5}
    ),
    "cp2-dp2-zero3-full": case(1, 1, 2, cp=2, zero=3, training={"recompute": "full"}),
    "ulysses2-tp2-dp2-sp-documents": case(2, 1, 2, cp=2, cp_kind="ulysses", sequence_parallel=True, training=DOCUMENTS),
    "fp64-cp4-gpt2-documents": case(cp=4, model=GPT2, training={**DOCUMENTS, "precision": "fp64"}),
    "cp4-zero0-window": case(cp=4, zero=0, model={"window": 5}),
    "cp2-dp4-hsdp-zero2": case(1, 1, 4, cp=2, zero=2, dp_replicate=2, training={"eod_mask_loss": True}),
    "cp2-dp2-zero0-documents": case(1, 1, 2, cp=2, zero=0, training=DOCUMENTS),
    "cp2-tp4-sp-kv1": case(4, cp=2, sequence_parallel=True, model={"num_kv_heads": 1}),
    "cp2-pp2-gpipe-cheap": case(
        1,
        2,
        cp=2,
        schedule="gpipe",
        model=QWEN3,
        training={"recompute": "cheap"},
        optimizer={"lr": 1e-3},  # at 3e-3 rounding grows a thousandfold in step 6, with dp 2 instead of cp 2, too
    ),
    "cp2-pp4-documents": case(1, 4, cp=2, training=DOCUMENTS),
    "cp2-interleaved-zero3-documents": case(1, 2, 2, cp=2, schedule="interleaved1f1b", zero=3, training=DOCUMENTS),
    "cp2-zero-bubble-core-again": case(
        2,
        2,
        cp=2,
        schedule="interleavedzerobubble",
        sequence_parallel=True,
        model=QWEN2,
        training={"recompute": {"again": ["core_attention"]}},
    ),
    "cp2-zbv-tied-window": case(1, 2, cp=2, schedule="zbvzerobubble", model={**TIED, "window": 3}),
    "cp2-zero-bubble-sinks": case(
        1, 2, 2, cp=2, schedule="interleavedzerobubble", model={"attention_sinks": True}, training=DOCUMENTS
    ),
    "cp2-dualpipev": case(1, 2, 2, cp=2, schedule="dualpipev"),
    "ulysses4-kv1": case(cp=4, cp_kind="ulysses", model={"num_kv_heads": 1}),
    "ulysses4-kv2-zero3-documents-windows": case(
        1, 1, 2, cp=4, cp_kind="ulysses", zero=3, model=WINDOWS, training=DOCUMENTS
    ),
    "ulysses2-tp2-dp2-zero2-qwen3-cheap": case(
        2, 1, 2, cp=2, cp_kind="ulysses", zero=2, model=QWEN3, training={"recompute": "cheap"}
    ),
    "ulysses2-zbv-documents-full": case(
        1, 2, 2, cp=2, cp_kind="ulysses", schedule="zbvzerobubble", training={**DOCUMENTS, "recompute": "full"}
    ),
    "ulysses2-tp2-interleaved-sp-kv1": case(
        2,
        2,
        cp=2,
        cp_kind="ulysses",
        schedule="interleaved1f1b",
        sequence_parallel=True,
        model={"num_kv_heads": 1},
    ),
    "ulysses2-tp2-sinks-window": case(2, cp=2, cp_kind="ulysses", model={"attention_sinks": True, "window": 6}),
    "compile-cp2-tp2-sp": case(2, cp=2, sequence_parallel=True, training={"compile": True}),
    "compile-ulysses2-cheap": case(cp=2, cp_kind="ulysses", training={"compile": True, "recompute": "cheap"}),
    "fp64-cp8-documents-softcap": case(
        cp=8, model={"attention_softcap": 2.0}, training={**DOCUMENTS, "precision": "fp64"}
    ),
    "fp64-cp2-tp2-zero3-sp-documents": case(
        2, 1, 2, cp=2, zero=3, sequence_parallel=True, training={**DOCUMENTS, "precision": "fp64"}
    ),
    "fp64-ulysses2-gpt2-pp2-dp2": case(1, 2, 2, cp=2, cp_kind="ulysses", model=GPT2, training={"precision": "fp64"}),
    "latent-tp2-sp-zero-bubble": case(2, 2, schedule="interleavedzerobubble", sequence_parallel=True, model=LATENT),
    "latent-cp2-tp2-zero3-cheap": case(2, 1, 2, cp=2, zero=3, model=LATENT, training={"recompute": "cheap"}),
    "latent-tp4-dp2-zero0": case(4, 1, 2, zero=0, model=LATENT),
    "latent-whole-queries-tp2-zbv-full": case(
        2, 2, schedule="zbvzerobubble", sequence_parallel=True, model=WHOLE_QUERIES, training={"recompute": "full"}
    ),
    "latent-whole-queries-cp2-dualpipev": case(1, 2, cp=2, schedule="dualpipev", model=WHOLE_QUERIES),
    "latent-dp4-hsdp-zero2-windows": case(1, 1, 4, zero=2, dp_replicate=2, model={**LATENT, **WINDOWS}),
    "latent-cp2-tp2-sp-sinks-documents": case(
        2,
        1,
        2,
        cp=2,
        sequence_parallel=True,
        model={**LATENT, "attention_sinks": True, "attention_scale": 0.4},
        training=DOCUMENTS,
    ),
    "latent-ulysses2-tp2-interleaved": case(
        2, 2, cp=2, cp_kind="ulysses", schedule="interleaved1f1b", sequence_parallel=True, model=LATENT
    ),
    "compile-latent-tp2-sp": case(2, sequence_parallel=True, model=LATENT, training={"compile": True}),
    "fp64-latent-tp2-pp2-cp2-sp": case(
        2, 2, cp=2, sequence_parallel=True, model=LATENT, training={**DOCUMENTS, "precision": "fp64"}
    ),
}


def train(raw: dict[str, Any], device: torch.device | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step, on any rank; on the CPU, if no device is named."""
    import numpy as np
    import torch

    from tplaunch.parallel.cross_entropy import IGNORE
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.spec.course import Course
    from tplaunch.train.batch import Batch, share
    from tplaunch.train.step import TrainStep

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, device or torch.device("cpu"))
    random = np.random.default_rng(0)
    data = random.integers(0, VOCAB // 10, (STEPS * BATCH, SEQ + 1)) * (
        recipe.model.vocab_size // 30
    )  # few, on every tp rank: quickly learnt
    positions = np.broadcast_to(np.arange(SEQ), (STEPS * BATCH, SEQ)).copy()
    for row, start in enumerate(random.integers(1, SEQ, STEPS * BATCH)):
        positions[row, start:] -= start  # a second document begins here
    train_step = TrainStep(recipe, mesh)
    curve = []
    course = Course(recipe)
    for step in range(1, recipe.training.steps + 1):
        samples = np.asarray(share(course, step, mesh.coordinates.dp, mesh.topology.dp))
        tokens, labels, places = (torch.from_numpy(a[samples]) for a in (data[:, :-1], data[:, 1:], positions))
        if recipe.training.eod_mask_loss:
            labels = labels.masked_fill(places.roll(-1, 1) == 0, IGNORE)
        masked = recipe.training.document_mask
        result = train_step.run(Batch(tokens.contiguous(), labels.contiguous(), places if masked else None))
        curve.append((result.loss, result.grad_norm))
    return curve


def plain(raw: dict[str, Any]) -> dict[str, Any]:
    """The reference of a case."""
    training = {key: value for key, value in raw["training"].items() if key not in ("recompute", "compile")}
    return {**raw, "topology": {"tp": 1, "pp": 1, "dp": 1}, "training": training}


def test_the_readme_counts_them() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert f"(`tests/train/test_topology_invariance.py`, {len(CASES)} combinations)" in readme.read_text()


@pytest.fixture(scope="module")
def references() -> dict[str, list[tuple[float, float]]]:
    return {}


CONTEXT = {name for name, raw in CASES.items() if raw["topology"].get("cp", 1) > 1}

# What these combine, others above show part by part; they would take the default suite beyond ten minutes.
COMBINED = {
    "tp2-pp2-dp2",
    "documents",
    "tp2-pp2-dp2-hsdp-zero0",
    "zbv-tp-full",
    "kv1-tp2-pp2-biased",
    "gpt2-tp4-dp2",
    "qwen3-tp4-dp2",
    "qwen2-tp2-pp2",
    "qwen3-kv2-tp4-sp-cheap",
    "zero-bubble-core-again",
    "documents-gpt2-kv",
    "documents-pp4-full",
    "fp64-pp4-zbv-tied",
    "fp64-gpt2-tp2-pp2",
    *CONTEXT
    - {
        "cp2-tp2-pp2-sp-documents-windows",
        "cp2-dp2-zero3-full",
        "ulysses2-tp2-dp2-sp-documents",
        "fp64-cp4-gpt2-documents",
        "latent-cp2-tp2-zero3-cheap",
    },
    *(name for name in CASES if "latent" in name and "cp2" not in name and "bubble" not in name),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in COMBINED else []) for name in CASES]
)
def test_curve_is_that_of_one_process(
    world: World, references: dict[str, list[tuple[float, float]]], name: str
) -> None:
    raw = CASES[name]
    reference = plain(raw)
    key = repr(reference)
    if key not in references:
        (references[key],) = world.run(1, train, reference)
    curves = world.run(ranks(raw), train, raw)
    assert all(curve == curves[0] for curve in curves), "the ranks do not agree"
    tolerance = TOLERANCE[raw["training"]["precision"]]
    for step, (ours, theirs) in enumerate(zip(curves[0], references[key], strict=True), 1):
        assert ours == pytest.approx(theirs, rel=tolerance), f"step {step}"
    assert curves[0][-1][0] < curves[0][0][0], "nothing was learnt"
