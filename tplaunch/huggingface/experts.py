"""Experts and latent attention as a `config.json` of transformers says them, and back. Torch-free."""

from __future__ import annotations

from typing import Any

from tplaunch.huggingface.families import (
    DEEPSEEK_V3,
    GPT_OSS,
    HAS,
    MIXTRAL,
    QWEN3_MOE,
    Family,
    latent_scale,
    plain_scale,
)
from tplaunch.recipe.schema import Experts, Model

Config = dict[str, Any]


def write_experts(model: Model, moe: Experts, family: Family) -> Config:
    """What is said of experts, and of latent attention."""
    found: Config = {"num_experts_per_tok": moe.top_k, "output_router_logits": False}
    if family in (MIXTRAL, GPT_OSS):
        found |= {"num_local_experts": moe.experts, "intermediate_size": moe.ffn_hidden_size}
        if family == GPT_OSS:
            return {**found, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
        usual = model.head_dim is None or model.head_dim * model.num_heads == model.hidden_size
        return {**found, "router_jitter_noise": 0.0, "head_dim": None if usual else model.head_dim}
    found |= {"moe_intermediate_size": moe.ffn_hidden_size, "norm_topk_prob": moe.normalize}
    if family == QWEN3_MOE:
        dense = list(range(moe.dense_layers))
        return {**found, "num_experts": moe.experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    latent = model.latent
    assert latent is not None
    return {
        **found,
        "n_routed_experts": moe.experts,
        "n_shared_experts": (moe.shared_ffn_hidden_size or 0) // moe.ffn_hidden_size,
        "first_k_dense_replace": moe.dense_layers,
        "moe_layer_freq": 1,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "head_dim": latent.rope_dim,  # transformers makes its rotary table of it
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": True,
    }


def read_experts(config: Config, family: Family, scaling: Config | None) -> Config:
    """What is said of experts, and of latent attention."""
    kv_heads = {MIXTRAL: 8, QWEN3_MOE: 4, GPT_OSS: 8}.get(family)
    fields: Config = {"num_kv_heads": config.get("num_key_value_heads", kv_heads)}
    moe: Config = {name.partition(".")[2]: value for name, value in HAS[family].own.items() if name.startswith("moe.")}
    moe |= {"top_k": config.get("num_experts_per_tok", {MIXTRAL: 2, GPT_OSS: 4}.get(family, 8))}
    experts, ffn = config.get("num_local_experts", config.get("num_experts")), config.get("intermediate_size")
    if family == QWEN3_MOE:
        experts, ffn = config.get("num_experts", experts), config.get("moe_intermediate_size")
        moe |= {"dense_layers": len(_dense_layers(config)), "normalize": config.get("norm_topk_prob", False)}
    if family == DEEPSEEK_V3:
        experts, ffn = config.get("n_routed_experts", experts), config.get("moe_intermediate_size")
        moe |= {
            "dense_layers": config.get("first_k_dense_replace", 3),
            "normalize": config.get("norm_topk_prob", True),
            "scale": config.get("routed_scaling_factor", 2.5),
            "groups": config.get("n_group", 8),
            "top_groups": config.get("topk_group", 4),
            "bias_rate": 0.0,  # they stay as they are, unless a recipe says otherwise
        }
        shared = config.get("n_shared_experts", 1)
        if isinstance(shared, int) and isinstance(ffn, int):
            moe["shared_ffn_hidden_size"] = shared * ffn
        fields |= _read_latent(config, scaling)
    return {**fields, "moe": {**moe, "experts": experts, "ffn_hidden_size": ffn}}


def _dense_layers(config: Config) -> list[Any]:
    """Layers of Qwen3-MoE without experts."""
    said = config.get("mlp_only_layers") or []
    return sorted(said) if isinstance(said, list) and all(isinstance(layer, int) for layer in said) else [None]


def _read_latent(config: Config, scaling: Config | None) -> Config:
    nope, turned = config.get("qk_nope_head_dim", 128), config.get("qk_rope_head_dim", 64)
    fields: Config = {
        "head_dim": None,  # a file's is the part that is turned
        "latent": {
            "q_rank": config.get("q_lora_rank", 1536),
            "kv_rank": config.get("kv_lora_rank", 512),
            "nope_dim": nope,
            "rope_dim": turned,
            "value_dim": config.get("v_head_dim", 128),
        },
    }
    weight, factor = (0.0, 1.0) if scaling is None else (scaling.get("mscale_all_dim"), scaling.get("factor", 1.0))
    if all(type(number) in (int, float) for number in (nope, turned, weight, factor)):
        scale = latent_scale(nope + turned, weight, float(factor))
        fields["attention_scale"] = None if scale == plain_scale(nope + turned) else scale
    return fields


def allowed_of_experts(config: Config, family: Family) -> dict[str, tuple[Any, ...]]:
    """Keys, and the values with which a model computes what ours does; None stands for a missing key, too."""
    if family == MIXTRAL:
        return {"router_jitter_noise": (None, 0, 0.0)}
    if family == QWEN3_MOE:
        first = list(range(len(_dense_layers(config))))
        return {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, first)}
    if family == GPT_OSS:
        return {"swiglu_alpha": (None, 1.702), "swiglu_limit": (None, 7.0), "attention_bias": (None, False, True)}
    if family == DEEPSEEK_V3:
        return {
            "rope_interleave": (None, True),
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "moe_layer_freq": (None, 1),
            "num_key_value_heads": (None, config.get("num_attention_heads")),
        }
    return {}
