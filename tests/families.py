"""Small random models of several families: as transformers builds them, and as tplaunch names their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WINDOW = 24
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, POSITIONS = 300, 64, 3, 4, 2, 112, 64
SEQ = 96  # longer than POSITIONS, the context that rope scaling starts from

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "ffn_hidden_size": FFN,
    "vocab_size": VOCAB,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "norm_eps": 1e-6,
    "activation": "geglu",
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embeddings": True,
    "tie_embeddings": True,
    "window": WINDOW,
    "attention_scale": 20**-0.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **_COMMON,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position": POSITIONS,
        },
    },
    "llama-tied": {**_COMMON, "tie_embeddings": True},
    "mistral": {**_COMMON, "head_dim": 24},
    "qwen2": {**_COMMON, "qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3": {**_COMMON, "qk_norm": True, "head_dim": 32, "norm_eps": 1e-6, "rope_theta": 1e6},
    "mistral-window": {**_COMMON, "window": WINDOW},
    "qwen3-window": {
        **_COMMON,
        "qk_norm": True,
        "head_dim": 32,
        "window": WINDOW,
        "window_layers": ["full", "window", "window"],
    },
    "llama-yarn": {
        **_COMMON,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position": 32,
            "mscale": 0.8,
            "mscale_all_dim": 0.4,
        },
    },
    "gemma2": {
        **_COMMON,
        **_GEMMA,
        "window_layers": ["window", "full"],
        "attention_softcap": 0.05,
        "logit_softcap": 0.3,
    },
    "gemma3": {
        **_COMMON,
        **_GEMMA,
        "qk_norm": True,
        "window_layers": ["window", "window", "full"],
        "rope_theta": 1e6,
        "window_rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    "gpt2": {
        **_COMMON,
        "num_kv_heads": HEADS,
        "norm": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "max_position": SEQ,
        "qkv_bias": True,
        "linear_bias": True,
        "tie_embeddings": True,
    },
}


# What transformers is told beside.
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # as version 0.3
    "mistral-window": {"sliding_window": WINDOW},
    "qwen3-window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "pad_token_id": None,
        "attn_logit_softcapping": 0.05,
        "final_logit_softcapping": 0.3,
        "attn_implementation": "eager",
    },
    "gemma3": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "pad_token_id": None,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def reference(family: str) -> PreTrainedModel:
    """The transformers model, in eval mode, fp32, with weights large enough to matter."""
    torch.manual_seed(7)
    if family == "gpt2":
        gpt2 = GPT2Config(
            vocab_size=VOCAB,
            n_positions=SEQ,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=FFN,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: PreTrainedModel = GPT2LMHeadModel(gpt2)
    else:
        spec = MODELS[family]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.get("rope_theta", 10000.0)}
        if scaling := spec.get("rope_scaling"):
            renamed = {"type": "rope_type", "original_max_position": "original_max_position_embeddings"}
            rope |= {"rope_type": "llama3", **{renamed.get(name, name): value for name, value in scaling.items()}}
        kinds: dict[str, tuple[Any, Any]] = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "gemma2": (Gemma2Config, Gemma2ForCausalLM),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
        }
        config, causal_lm = kinds[family.split("-")[0]]
        extra: dict[str, Any] = {"head_dim": spec["head_dim"]} if "head_dim" in spec else {}
        extra |= _OWN.get(family, {})
        if family == "gemma3":
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        model = causal_lm(
            config(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=FFN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                rms_norm_eps=spec.get("norm_eps", 1e-5),
                max_position_embeddings=4 * SEQ,
                rope_parameters=rope,
                tie_word_embeddings=spec.get("tie_embeddings", False),
                **extra,
            )
        )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def tensors(model: Any, family: str, *, grad: bool = False) -> dict[str, Tensor]:
    """Weights, or gradients, under tplaunch's global names and shapes (vocabulary unpadded)."""
    found = {name: (t.grad if grad else t).detach() for name, t in model.named_parameters()}
    return _gpt2(found) if family == "gpt2" else _llama(found, gemma=family.startswith("gemma"))


def _llama(found: dict[str, Tensor], *, gemma: bool) -> dict[str, Tensor]:
    after = {
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    }
    renames = {
        "model.embed_tokens.": "embedding.",
        "model.norm.": "norm.",
        "lm_head.": "output.",
        "model.layers.": "layers.",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "self_attn.": "attention.",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    } | (after if gemma else {})
    out = {}
    for name, tensor in found.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def _gpt2(found: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "embedding.weight": found["transformer.wte.weight"],
        "position.weight": found["transformer.wpe.weight"],
        "norm.weight": found["transformer.ln_f.weight"],
        "norm.bias": found["transformer.ln_f.bias"],
    }
    for i in range(LAYERS):
        old, new = f"transformer.h.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            out[f"{new}.attention_norm.{kind}"] = found[f"{old}.ln_1.{kind}"]
            out[f"{new}.mlp_norm.{kind}"] = found[f"{old}.ln_2.{kind}"]
            parts = found[f"{old}.attn.c_attn.{kind}"].chunk(3, dim=-1)  # Conv1D keeps [in, out]
            for part, name in zip(parts, ("wq", "wk", "wv"), strict=True):
                out[f"{new}.attention.{name}.{kind}"] = part.t()
            out[f"{new}.attention.wo.{kind}"] = found[f"{old}.attn.c_proj.{kind}"].t()
            out[f"{new}.mlp.up.{kind}"] = found[f"{old}.mlp.c_fc.{kind}"].t()
            out[f"{new}.mlp.down.{kind}"] = found[f"{old}.mlp.c_proj.{kind}"].t()
    return out
