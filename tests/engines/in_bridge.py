"""Logits of megatron-core, to which Megatron-Bridge brings a folder's model: a JSON request on stdin, `ANSWER` and JSON
on stdout.

Without a GPU both need help: Bridge imports Transformer Engine, which does not install here, and megatron-core puts
things on the GPU whatever it is told. What computes are megatron-core's own layers (its "local" ones); what reads
config.json and brings the weights is Bridge's own code.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import sys
import types
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel  # before the stand-in, or it takes that for the real thing
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import attention
from megatron.core.transformer.moe import moe_utils


class Named(type):
    """A class that has every other as an attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (torch.nn.Module,), {})


class StandIn(types.ModuleType):
    """A package that has every class: Bridge names some of Transformer Engine's, for adapters, and makes none."""

    __path__ = ()
    __version__ = "2.10.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (torch.nn.Module,), {})


def stand_in() -> None:
    """Do without Transformer Engine and without a GPU."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        module = StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    if attention.TELinear is None:  # where it was looked for and not found: layers ask whether they are of it
        attention.TELinear = Named("TELinear", (torch.nn.Module,), {})
    moe_utils.te_general_gemm = None
    torch.cuda.current_device = lambda: "cpu"  # where the rotary frequencies go
    CudaRNGStatesTracker.fork = lambda self, *names: contextlib.nullcontext()  # of dropout, which is 0


def answer(request: dict[str, Any]) -> list[Any]:
    """Logits of token sequences in fp32, [sequence, position, vocabulary].

    Args:
        request: `model`, a folder; `tokens`, sequences of one length.
    """
    stand_in()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_hf_pretrained(request["model"], torch_dtype=torch.float32)
    provider = bridge.to_megatron_provider()
    provider.transformer_layer_spec = local_layer_spec
    provider.params_dtype, provider.bf16, provider.fp16 = torch.float32, False, False
    for fused in ("apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion"):
        setattr(provider, fused, False)
    for fused in ("bias_activation_fusion", "bias_dropout_fusion", "persist_layer_norm"):
        setattr(provider, fused, False)
    for fused in ("moe_permute_fusion", "moe_grouped_gemm"):  # kernels for a GPU; the experts one by one are the same
        setattr(provider, fused, False)
    provider.moe_token_dispatcher_type = "allgather"  # without streams of a GPU
    provider.finalize()
    model: GPTModel
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, mixed_precision_wrapper=None
    )
    tokens = torch.tensor(request["tokens"])
    length = tokens.shape[1]
    hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(length).expand_as(tokens), hidden).tolist()


if __name__ == "__main__":
    print("ANSWER", json.dumps(answer(json.load(sys.stdin))), flush=True)
