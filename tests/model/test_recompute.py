"""Parts of a block that are made again: gradients bit for bit, and the bytes that a block keeps."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from tests.recipes import SEQ, VOCAB, case, resolved
from tests.world import World
from tplaunch.spec.recompute import PARTS

GPT2 = {
    "num_kv_heads": 4,
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "max_position": SEQ,
    "qkv_bias": True,
    "linear_bias": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "gpt2": GPT2,
    "gpt2, norms of heads": {**GPT2, "qk_norm": True},
}
# Each part alone, each two, all but one: chains of all lengths.
SETS: list[Any] = [
    "cheap",
    "full",
    {"every": 2},
    *({"again": list(parts)} for count in (1, 2) for parts in combinations(PARTS, count)),
    *({"save": [part]} for part in PARTS),
]


def kept_bytes(raw: dict[str, Any], sets: list[Any]) -> list[tuple[int, float]]:
    """Bytes that a block holds between its forward and its backward pass, for each set: counted and planned."""
    from tests.measure import StorageCounter
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.plan.case import Case
    from tplaunch.plan.memory import block_activations
    from tplaunch.spec.gpu import GPUS
    from tplaunch.spec.recompute import chosen

    found = []
    for recompute in sets:
        recipe = resolved({**raw, "training": {**raw["training"], "recompute": recompute}})
        mesh = Mesh.of(recipe, torch.device("cpu"))
        (stage,) = build_stages(recipe, mesh)
        plan = Case(recipe, GPUS["h100-80gb"])
        length = SEQ // mesh.tp.size if mesh.tp.sequence_parallel else SEQ
        dtype = next(stage.module.parameters()).dtype
        with StorageCounter() as counter:
            x = torch.randn(length, recipe.training.micro_batch_size, recipe.model.hidden_size, dtype=dtype)
            x.requires_grad_()
            known = [*stage.module.parameters(), *([] if stage.module.rope is None else [stage.module.rope])]
            for tensor in known:
                counter.add(getattr(tensor, "_local_tensor", tensor))
            before = counter.bytes - x.nbytes
            y = stage.module.layers["0"](x, stage.module.rope, None)
            held = counter.bytes - before - y.nbytes
        found.append((held, block_activations(plan, chosen(recipe.training, 0))))
    return found
