"""torchtitan's Llama 3, parallelize_llama (DTensor tensor and sequence parallelism, FSDP2) and pipeline_llm (1F1B).

All of it runs unchanged; the loop around it, which is its Trainer's, stands here. Two things are in its way on a CPU:
it imports triton, for kernels that are not used here, and it takes "cuda" for the device where there is none.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types

import torch
import torch._functorch.aot_autograd
import torch._inductor.compile_fx
import torch.distributed as dist
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
import torch.nn.attention.flex_attention
import torch.nn.functional as F

from benchmarks.peers.driver import Microbatches, adamw, measure, start


class Stub(types.ModuleType):
    """Stands for triton while torchtitan is imported, after torch has looked for the real one: all is a decorator."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda function=None, *_, **__: function if callable(function) else (lambda decorated: decorated)


stubs = {name: Stub(name) for name in ("triton", "triton.language")}
stubs["triton"].language = stubs["triton.language"]
sys.modules.update(stubs)
import torchtitan.tools.utils as utils  # noqa: E402

utils.device_type, utils.device_module = "cpu", torch.cpu
from torchtitan.config.job_config import JobConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.pipeline_parallel import pipeline_llm  # noqa: E402
from torchtitan.models.llama3 import Transformer, parallelize_llama  # noqa: E402

for name in stubs:
    del sys.modules[name]
for name, module in list(sys.modules.items()):
    if name.startswith("torchtitan") and getattr(module, "device_type", None) == "cuda":
        module.device_type = "cpu"  # taken over before it was set above

job = start()
logging.getLogger().setLevel(logging.ERROR)
shape, (tp, pp, dp, _) = job.shape, job.grid
dims = ParallelDims(dp_replicate=1, dp_shard=dp, cp=1, tp=tp, pp=pp, ep=1, etp=1, world_size=job.grid.ranks)
dims.build_mesh()
config = JobConfig()
config.training.seq_len = shape.seq
config.training.local_batch_size = shape.micro * (job.microbatches if pp > 1 else 1)
config.training.mixed_precision_param = config.training.mixed_precision_reduce = "float32"
config.activation_checkpoint.mode = "none"
parallelism = config.parallelism
parallelism.tensor_parallel_degree, parallelism.pipeline_parallel_degree = tp, pp
parallelism.data_parallel_shard_degree = dp
parallelism.pipeline_parallel_schedule = "1F1B"
parallelism.pipeline_parallel_microbatch_size = shape.micro
arguments = shape.torchtitan()


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="sum") / shape.tokens


with torch.device("meta"):
    model = Transformer(arguments)
assert model.layers["0"].feed_forward.w1.out_features == shape.ffn
schedule, first, last = None, True, True
if pp > 1:
    schedule, parts, first, last = pipeline_llm(
        model, dims, config, torch.device("cpu"), arguments, parallelize_llama, loss_of
    )
    del model
else:
    parts = [parallelize_llama(model, dims, config)]
for part in parts:
    for module in part.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    part.to_empty(device="cpu")
    with torch.no_grad():
        part.init_weights(buffer_device=None)
    part.train()
optimizer = adamw([parameter for part in parts for parameter in part.parameters()])


def context() -> contextlib.AbstractContextManager[object]:
    return torch.distributed.tensor.parallel.loss_parallel() if tp > 1 else contextlib.nullcontext()


def scalar(value: torch.Tensor) -> float:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).item()


def train(microbatches: Microbatches) -> float | None:
    optimizer.zero_grad()
    losses: list[torch.Tensor] = []
    if schedule is not None:
        tokens, targets = (torch.cat(part) for part in zip(*microbatches, strict=True))
        with context():
            schedule.step(
                *([tokens] if first else []),
                target=targets if last else None,
                losses=losses if last else None,
                return_outputs=False,
            )
    else:
        for tokens, targets in microbatches:
            with context():
                loss = loss_of(parts[0](tokens), targets)
                loss.backward()
            losses.append(loss)
    total = sum(scalar(loss.detach()) for loss in losses) if losses else None
    if dp > 1 and total is not None:
        shared = torch.tensor(total)
        dist.all_reduce(shared, group=dims.get_mesh("fsdp").get_group())
        total = shared.item()
    optimizer.step()
    return total


measure(job, "torchtitan", train)
