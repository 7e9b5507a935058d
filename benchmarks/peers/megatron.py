"""megatron-core's GPTModel with the local layer spec, its schedules and its DistributedDataParallel.

They run unchanged; they name CUDA throughout, so this file answers for it with the CPU. The fused kernels of Apex and
Transformer Engine exist on no CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.llama import NORM_EPS, ROPE_THETA
from benchmarks.peers.driver import Microbatches, adamw, measure, start

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
warnings.filterwarnings("ignore")


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of tensors that takes the CPU where CUDA is asked for."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


torch.cuda.current_device = lambda: "cpu"
torch.cuda.synchronize = lambda *_: None  # one function each: dynamo, which is imported, refuses two names for one
torch.cuda.set_device = lambda *_: None
torch.cuda.Stream = torch.cuda.Event = lambda *_, **__: Mock()
torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Mock()
torch.cuda.stream = lambda _: contextlib.nullcontext()
torch.Tensor.cuda = lambda self, *_, **__: self
torch.nn.Module.cuda = lambda self, *_, **__: self
for name in ("zeros", "ones", "empty", "tensor", "arange", "full"):
    setattr(torch, name, on_cpu(getattr(torch, name)))

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def host_copy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What its all-to-all takes: its own leaves a tensor that is on the CPU as it is."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


token_dispatcher.maybe_move_tensor_to_cpu = host_copy
moe_utils.te_general_gemm = None  # 0.16.1 asks for it where Transformer Engine, which defines it, is not installed
CudaRNGStatesTracker.fork = lambda self, *_, **__: contextlib.nullcontext()  # for dropout, of which there is none

job = start()
shape, (tp, pp, dp, ep) = job.shape, job.grid
parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
experts = {
    "num_moe_experts": shape.experts,
    "moe_ffn_hidden_size": shape.ffn,
    "moe_router_topk": shape.top_k,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": ep,
}
config = TransformerConfig(
    num_layers=shape.layers,
    hidden_size=shape.hidden,
    num_attention_heads=shape.heads,
    num_query_groups=shape.kv_heads,
    ffn_hidden_size=shape.ffn,
    use_cpu_initialization=True,
    tensor_model_parallel_size=tp,
    pipeline_model_parallel_size=pp,
    params_dtype=torch.float32,
    pipeline_dtype=torch.float32,
    add_bias_linear=False,
    gated_linear_unit=True,
    activation_func=F.silu,
    normalization="RMSNorm",
    layernorm_epsilon=NORM_EPS,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    apply_rope_fusion=False,
    finalize_model_grads_func=finalize_model_grads,
    deallocate_pipeline_outputs=True,
    **(experts if shape.experts else {}),
)
model = DistributedDataParallel(
    config,
    DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=dp > 1),
    GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=shape.experts or None, normalization="RMSNorm"),
        shape.vocab,
        shape.seq,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=ROPE_THETA,
    ),
)
if dp > 1:
    model.broadcast_params()
    config.no_sync_func = model.no_sync
model.train()
optimizer = adamw(list(model.parameters()))
mask = torch.triu(torch.ones(1, 1, shape.seq, shape.seq, dtype=torch.bool), diagonal=1)
positions = torch.arange(shape.seq).expand(shape.micro, -1)
forward_backward = get_forward_backward_func()


def forward_step(data: Iterator[tuple[torch.Tensor, torch.Tensor]], module: torch.nn.Module) -> tuple[Any, Any]:
    tokens, targets = next(data)

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.mean()
        return loss, {"loss": loss.detach()}

    return module(tokens, positions, mask, labels=targets), loss_of


def train(microbatches: Microbatches) -> float | None:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = forward_backward(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=shape.seq,
        micro_batch_size=shape.micro,
        forward_only=False,
    )
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad
    optimizer.step()
    if not parallel_state.is_pipeline_last_stage():
        return None
    total = torch.stack([each["loss"] for each in losses]).sum()  # the schedule has divided each by their number
    if dp > 1:
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item() / dp


measure(job, "megatron-core", train)
