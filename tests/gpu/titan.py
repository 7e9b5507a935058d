"""torchtitan's step (0.2.2), where it is installed: its Llama 3 under its own parallelize function, blocks compiled,
and what its Trainer does around them on one GPU: autocast, clipped gradients, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from benchmarks.llama import Shape


def titan(shape: Shape, device: torch.device) -> Callable[[], object]:
    """A step on random tokens."""
    from torchtitan.config.job_config import JobConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.llama3 import Transformer, parallelize_llama

    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    dims.build_mesh()
    config = JobConfig()
    config.training.seq_len = shape.seq
    config.activation_checkpoint.mode = "none"
    config.compile.enable = device.type == "cuda"
    with torch.device("meta"):
        model = Transformer(shape.torchtitan())
    assert model.layers["0"].feed_forward.w1.out_features == shape.ffn
    model = parallelize_llama(model, dims, config)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(shape.vocab, (shape.batch, shape.seq + 1), device=device)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step
