"""Small random models of several families: as transformers builds them, and as tplaunch names their weights."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

WINDOW = 24
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, POSITIONS = 300, 64, 3, 4, 2, 112, 64
EXPERT = 40
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
    "llama-attention-bias": {**_COMMON, "qkv_bias": True, "linear_bias": True, "mlp_bias": False},
    "llama-mlp-bias": {**_COMMON, "mlp_bias": True},
    "mistral": {**_COMMON, "head_dim": 24, "family": "mistral"},
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
    "olmo2": {
        **_COMMON,
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "qk_norm_all_heads": True,
        "rope_theta": 5e5,
    },
    "phi3": {**_COMMON, "family": "phi3", "window": WINDOW},
    "phi3-partial": {**_COMMON, "rotary_fraction": 0.75, "tie_embeddings": True},
    "granite": {
        **_COMMON,
        "norm_eps": 1e-6,
        "attention_scale": 0.2,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logit_divisor": 6.0,
        "tie_embeddings": True,
    },
    "smollm3": {
        **_COMMON,
        "rope_layers": ["rope", "none", "rope"],
        "tie_embeddings": True,
        "rope_theta": 2e6,
    },
    "smollm3-window": {
        **_COMMON,
        "rope_layers": ["rope", "none", "none"],
        "window": WINDOW,
        "window_layers": ["full", "window", "window"],
        "rope_theta": 2e6,
    },
    "gpt_neox": {
        **_COMMON,
        "num_kv_heads": HEADS,
        "norm": "layernorm",
        "activation": "gelu_exact",
        "qkv_bias": True,
        "linear_bias": True,
        "rotary_fraction": 0.25,
        "parallel_residual": True,
    },
    "gpt_neox-in-turn": {
        **_COMMON,
        "num_kv_heads": HEADS,
        "norm": "layernorm",
        "activation": "gelu_exact",
        "mlp_bias": True,
        "rotary_fraction": 0.5,
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
    "mixtral": {**_COMMON, "rope_theta": 1e6, "moe": {"experts": 8, "top_k": 2, "ffn_hidden_size": FFN}},
    "mixtral-window": {**_COMMON, "window": WINDOW, "moe": {"experts": 4, "top_k": 1, "ffn_hidden_size": FFN}},
    "qwen3_moe": {
        **_COMMON,
        "qk_norm": True,
        "head_dim": 32,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "moe": {"experts": 8, "top_k": 3, "ffn_hidden_size": EXPERT},
    },
    "qwen3_moe-dense-first": {
        **_COMMON,
        "qk_norm": True,
        "qkv_bias": True,
        "linear_bias": True,
        "mlp_bias": False,
        "window": WINDOW,
        "tie_embeddings": True,
        "moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": EXPERT, "dense_layers": 1, "normalize": False},
    },
    "deepseek_v3": {
        **_COMMON,
        "num_kv_heads": HEADS,
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position": 32,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        "attention_scale": 20**-0.5 * (0.1 * 0.7 * log(8.0) + 1) ** 2,
        "latent": {"q_rank": 24, "kv_rank": 16, "nope_dim": 12, "rope_dim": 8, "value_dim": 10},
        "moe": {
            "experts": 8,
            "top_k": 3,
            "ffn_hidden_size": EXPERT,
            "shared_ffn_hidden_size": 2 * EXPERT,
            "dense_layers": 1,
            "router": "sigmoid",
            "scale": 2.5,
            "groups": 4,
            "top_groups": 2,
            "bias_rate": 0.0,
        },
    },
    "deepseek_v3-whole-queries": {
        **_COMMON,
        "num_kv_heads": HEADS,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
        "latent": {"kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 24},
        "moe": {
            "experts": 4,
            "top_k": 2,
            "ffn_hidden_size": EXPERT,
            "shared_ffn_hidden_size": EXPERT,
            "router": "sigmoid",
            "normalize": False,
            "bias_rate": 0.0,
        },
    },
    "gpt_oss": {
        **_COMMON,
        "head_dim": 16,
        "activation": "swiglu_clamped",
        "attention_sinks": True,
        "qkv_bias": True,
        "linear_bias": True,
        "window": WINDOW,
        "window_layers": ["window", "full"],
        "rope_theta": 150_000.0,
        "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position": 32, "truncate": False},
        "moe": {"experts": 8, "top_k": 4, "ffn_hidden_size": FFN, "biases": True},
    },
}


# What transformers is told beside.
_OWN: dict[str, dict[str, Any]] = {
    "llama-attention-bias": {"attention_bias": True},
    "llama-mlp-bias": {"mlp_bias": True},
    "phi3": {"sliding_window": WINDOW, "pad_token_id": None},
    "phi3-partial": {"pad_token_id": None},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": None},
    "smollm3-window": {
        "no_rope_layers": [1, 0, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "pad_token_id": None,
    },
    "gpt_neox-in-turn": {"use_parallel_residual": False, "attention_bias": False},
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
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral-window": {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": EXPERT,
        "norm_topk_prob": True,
    },
    "qwen3_moe-dense-first": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT,
        "mlp_only_layers": [0],
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "deepseek_v3": {
        "num_key_value_heads": HEADS,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": EXPERT,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_mtp_layers": 0,
    },
    "deepseek_v3-whole-queries": {
        "num_key_value_heads": HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "num_mtp_layers": 0,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": WINDOW,
        "attn_implementation": "eager",
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
            "olmo2": (Olmo2Config, Olmo2ForCausalLM),
            "phi3": (Phi3Config, Phi3ForCausalLM),
            "granite": (GraniteConfig, GraniteForCausalLM),
            "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
            "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
            "gemma2": (Gemma2Config, Gemma2ForCausalLM),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
            "mixtral": (MixtralConfig, MixtralForCausalLM),
            "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
            "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
            "gpt_oss": (GptOssConfig, GptOssForCausalLM),
        }
        config, causal_lm = kinds[family.split("-")[0]]
        extra: dict[str, Any] = {"head_dim": spec["head_dim"]} if "head_dim" in spec else {}
        extra |= _OWN.get(family, {})
        if "rotary_fraction" in spec:
            rope["partial_rotary_factor"] = spec["rotary_fraction"]
        extra = ({} if config is GPTNeoXConfig else {"num_key_value_heads": KV_HEADS}) | extra
        eps = "layer_norm_eps" if config is GPTNeoXConfig else "rms_norm_eps"
        if family == "gemma3":
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        model = causal_lm(
            config(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=FFN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                **{eps: spec.get("norm_eps", 1e-5)},
                max_position_embeddings=4 * SEQ,
                rope_parameters=rope,
                tie_word_embeddings=spec.get("tie_embeddings", False),
                **extra,
            )
        )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:  # else they are 0 and 1
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif name.endswith(("gate.weight", "router.weight")):  # else all experts have the same score
                tensor.mul_(20.0)
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def tensors(model: Any, family: str, *, grad: bool = False) -> dict[str, Tensor]:
    """Weights, or gradients, under tplaunch's global names and shapes (vocabulary unpadded)."""
    found = {name: (t.grad if grad else t).detach() for name, t in model.named_parameters()}
    if not grad:
        found |= {name: t for name, t in model.named_buffers() if name.endswith("e_score_correction_bias")}
    if family == "gpt2":
        return _gpt2(found)
    if family.startswith("gpt_neox"):
        return _gpt_neox(found)
    if "moe" in MODELS[family]:
        found = _experts(found, in_turn=family == "gpt_oss")
    return _llama(_split(found), after=family.startswith(("gemma", "olmo2")))


def _experts(found: dict[str, Tensor], *, in_turn: bool) -> dict[str, Tensor]:
    """The experts of each layer below one another, gate and up apart.

    Args:
        in_turn: gate and up take turns, and matrices are [in, out] (gpt-oss).
    """
    out = {}
    for name, tensor in found.items():
        before, _, kind = name.partition(".experts.")
        at = f"{before.removesuffix('.mlp')}.moe.experts"
        if kind.startswith("gate_up_proj"):
            which = "bias" if kind.endswith("bias") else "weight"
            halves = (tensor[..., ::2], tensor[..., 1::2]) if in_turn else tensor.chunk(2, 1)
            for half, new in zip(halves, ("gate", "up"), strict=True):
                ours = half if in_turn else half.transpose(1, 2)
                out[f"{at}.{new}.{which}"] = ours if which == "bias" else ours.flatten(0, 1)
        elif kind == "down_proj_bias":
            out[f"{at}.down.bias"] = tensor
        elif kind == "down_proj":
            out[f"{at}.down.weight"] = (tensor.transpose(1, 2) if in_turn else tensor).flatten(0, 1)
        else:
            out[name] = tensor
    return out


def _split(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Phi-3's fused projections, apart."""
    out = {}
    size = HIDDEN // HEADS
    fused = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), [HEADS * size, KV_HEADS * size, KV_HEADS * size]),
        "gate_up_proj": (("gate_proj", "up_proj"), [FFN, FFN]),
    }
    for name, tensor in found.items():
        parts, sizes = next((of for key, of in fused.items() if f".{key}." in name), ((), []))
        if not parts:
            out[name] = tensor
        for part, piece in zip(parts, tensor.split(sizes) if sizes else (), strict=True):
            out[name.replace("qkv_proj", part).replace("gate_up_proj", part)] = piece
    return out


def _gpt_neox(found: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = {
        "gpt_neox.embed_in.": "embedding.",
        "gpt_neox.final_layer_norm.": "norm.",
        "lm_head.": "output.",
        "embed_out.": "output.",
        "gpt_neox.layers.": "layers.",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "attention.dense": "attention.wo",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    }
    out = {}
    for name, tensor in found.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        if "query_key_value" not in name:
            out[name] = tensor
            continue
        for place, kind in enumerate(("wq", "wk", "wv")):  # head by head
            parts = [head.chunk(3)[place] for head in tensor.chunk(HEADS)]
            out[name.replace("query_key_value", kind)] = torch.cat(parts)
    return out


def _llama(found: dict[str, Tensor], *, after: bool) -> dict[str, Tensor]:
    """
    Args:
        after: there are norms of what attention and MLP give.
    """
    names = {
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
        "self_attn.q_a_proj": "attention.wq_a",
        "self_attn.q_b_proj": "attention.wq_b",
        "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
        "self_attn.kv_b_proj": "attention.wkv_b",
        "a_layernorm": "a_norm",
        "mlp.gate.e_score_correction_bias": "moe.router.correction",
        "mlp.gate.weight": "moe.router.weight",
        "mlp.router.": "moe.router.",
        "mlp.shared_experts.gate_proj": "moe.shared.gate",
        "mlp.shared_experts.up_proj": "moe.shared.up",
        "mlp.shared_experts.down_proj": "moe.shared.down",
        "self_attn.": "attention.",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    } | (names if after else {})
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
