"""transformers' LlamaForCausalLM: one process, or torch's DDP."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.peers.driver import Microbatches, adamw, measure, start
from benchmarks.peers.work import NORM_EPS, ROPE_THETA

logging.set_verbosity_error()
job = start()
shape, dp = job.shape, job.grid.dp
model: torch.nn.Module = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.seq,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attn_implementation="sdpa",
    )
)
model.train()
if dp > 1:
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
optimizer = adamw(list(model.parameters()))


def train(microbatches: Microbatches) -> float:
    total = torch.zeros(())
    for k, (tokens, targets) in enumerate(microbatches):
        last = k == len(microbatches) - 1
        with contextlib.nullcontext() if dp == 1 or last else model.no_sync():
            logits = model(input_ids=tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(microbatches)
            loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    if dp > 1:
        dist.all_reduce(total)
    return total.item() / dp


measure(job, "transformers", train)
