"""transformers' LlamaForCausalLM or MixtralForCausalLM: one process, or torch's DDP."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.peers.driver import Microbatches, adamw, measure, start

logging.set_verbosity_error()
job = start()
shape, dp = job.shape, job.grid.dp
model: torch.nn.Module = AutoModelForCausalLM.from_config(shape.transformers())
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
