"""Published model sizes, by name: what `model.preset` fills in beneath the fields that a recipe states.

Each is the model's own config.json (GPT-3: Brown et al. 2020, table 2.1; Megatron 1T: Narayanan et al. 2021, table 1).
`vocab_size` is the published one; padding comes on top.
"""

from __future__ import annotations

from math import log
from typing import Any


def _sizes(
    hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_hidden_size: int, vocab_size: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "ffn_hidden_size": ffn_hidden_size,
        "vocab_size": vocab_size,
    }


_LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 8192,
}
_LLAMA3 = {"norm_eps": 1e-5, "rope_theta": 500000.0}
_LLAMA31 = {**_LLAMA3, "rope_scaling": _LLAMA3_SCALING}
_LLAMA2 = {"norm_eps": 1e-5, "rope_theta": 10000.0}
_QWEN2 = {"norm_eps": 1e-6, "rope_theta": 1000000.0, "qkv_bias": True}
_QWEN3 = {"norm_eps": 1e-6, "rope_theta": 1000000.0, "qk_norm": True, "head_dim": 128}
_TIED = {"tie_embeddings": True}
_LLAMA32 = {**_LLAMA3, **_TIED, "rope_scaling": {**_LLAMA3_SCALING, "factor": 32.0}}
_OLMO2 = {
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "pre_norms": False,
    "post_norms": True,
    "qk_norm": True,
    "qk_norm_all_heads": True,
}
_GEMMA3 = {
    "norm_eps": 1e-6,
    "activation": "geglu",
    "norm_plus_one": True,
    "post_norms": True,
    "qk_norm": True,
    "scale_embeddings": True,
    "head_dim": 256,
    "window": 1024,
    "window_layers": ["window"] * 5 + ["full"],
    "rope_theta": 1000000.0,
    "window_rope_theta": 10000.0,
    **_TIED,
}
_GEMMA3_LONG = {**_GEMMA3, "rope_scaling": {"type": "linear", "factor": 8.0}}
_GPT = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "position": "learned",
    "qkv_bias": True,
    "linear_bias": True,
    "tie_embeddings": True,
}
_MIXTRAL = {"norm_eps": 1e-5, "rope_theta": 1000000.0}


def _mixture(experts: int, top_k: int, ffn_hidden_size: int, **more: Any) -> dict[str, Any]:
    return {"moe": {"experts": experts, "top_k": top_k, "ffn_hidden_size": ffn_hidden_size, **more}}


_GPT_OSS = {
    "norm_eps": 1e-5,
    "activation": "swiglu_clamped",
    "head_dim": 64,
    "rope_theta": 150000.0,
    "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position": 4096, "truncate": False},
    "window": 128,
    "window_layers": ["window", "full"],
    "attention_sinks": True,
    "qkv_bias": True,
    "linear_bias": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": {**_sizes(4096, 32, 32, 32, 11008, 32000), **_LLAMA2},
    "llama2-13b": {**_sizes(5120, 40, 40, 40, 13824, 32000), **_LLAMA2},
    "llama2-70b": {**_sizes(8192, 80, 64, 8, 28672, 32000), **_LLAMA2},
    "llama3-8b": {**_sizes(4096, 32, 32, 8, 14336, 128256), **_LLAMA3},
    "llama3-70b": {**_sizes(8192, 80, 64, 8, 28672, 128256), **_LLAMA3},
    "llama3-405b": {**_sizes(16384, 126, 128, 8, 53248, 128256), **_LLAMA31},
    "llama3.1-8b": {**_sizes(4096, 32, 32, 8, 14336, 128256), **_LLAMA31},
    "llama3.1-70b": {**_sizes(8192, 80, 64, 8, 28672, 128256), **_LLAMA31},
    "llama3.2-1b": {**_sizes(2048, 16, 32, 8, 8192, 128256), **_LLAMA32},
    "llama3.2-3b": {**_sizes(3072, 28, 24, 8, 8192, 128256), **_LLAMA32},
    # Version 0.3: unlike 0.1 without a sliding window.
    "mistral-7b": {**_sizes(4096, 32, 32, 8, 14336, 32768), "norm_eps": 1e-5, "rope_theta": 1000000.0},
    "qwen2-0.5b": {**_sizes(896, 24, 14, 2, 4864, 151936), **_QWEN2, **_TIED},
    "qwen2-1.5b": {**_sizes(1536, 28, 12, 2, 8960, 151936), **_QWEN2, **_TIED},
    "qwen2-7b": {**_sizes(3584, 28, 28, 4, 18944, 152064), **_QWEN2},
    "qwen3-0.6b": {**_sizes(1024, 28, 16, 8, 3072, 151936), **_QWEN3, **_TIED},
    "qwen3-1.7b": {**_sizes(2048, 28, 16, 8, 6144, 151936), **_QWEN3, **_TIED},
    "qwen3-4b": {**_sizes(2560, 36, 32, 8, 9728, 151936), **_QWEN3, **_TIED},
    "qwen3-8b": {**_sizes(4096, 36, 32, 8, 12288, 151936), **_QWEN3},
    "qwen3-14b": {**_sizes(5120, 40, 40, 8, 17408, 151936), **_QWEN3},
    "qwen3-32b": {**_sizes(5120, 64, 64, 8, 25600, 151936), **_QWEN3},
    "olmo2-7b": {**_sizes(4096, 32, 32, 32, 11008, 100352), **_OLMO2},
    "olmo2-13b": {**_sizes(5120, 40, 40, 40, 13824, 100352), **_OLMO2},
    "olmo2-32b": {**_sizes(5120, 64, 40, 8, 27648, 100352), **_OLMO2},
    "phi-4": {**_sizes(5120, 40, 40, 10, 17920, 100352), "norm_eps": 1e-5, "rope_theta": 250000.0, "family": "phi3"},
    "smollm3-3b": {
        **_sizes(2048, 36, 16, 4, 11008, 128256),
        "norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "rope_layers": ["rope"] * 3 + ["none"],
        **_TIED,
    },
    # The text models; 27b scales scores as if its heads were hidden_size / num_heads wide.
    "gemma3-1b": {**_sizes(1152, 26, 4, 1, 6912, 262144), **_GEMMA3, "window": 512},
    "gemma3-4b": {**_sizes(2560, 34, 8, 4, 10240, 262208), **_GEMMA3_LONG},
    "gemma3-12b": {**_sizes(3840, 48, 16, 8, 15360, 262208), **_GEMMA3_LONG},
    "gemma3-27b": {
        **_sizes(5376, 62, 32, 16, 21504, 262208),
        **_GEMMA3_LONG,
        "head_dim": 128,
        "attention_scale": 168**-0.5,
    },
    "mixtral-8x7b": {**_sizes(4096, 32, 32, 8, 14336, 32000), **_MIXTRAL, **_mixture(8, 2, 14336)},
    "mixtral-8x22b": {**_sizes(6144, 56, 48, 8, 16384, 32768), **_MIXTRAL, **_mixture(8, 2, 16384)},
    "qwen3-30b-a3b": {**_sizes(2048, 48, 32, 4, 6144, 151936), **_QWEN3, **_mixture(128, 8, 768)},
    "qwen3-235b-a22b": {**_sizes(4096, 94, 64, 4, 12288, 151936), **_QWEN3, **_mixture(128, 8, 1536)},
    # Without multi-token prediction. Scores are scaled by the square of YaRN's mscale (its first 14.8T tokens knew
    # neither), and the router's biases move as in arXiv 2412.19437, section 4.2.
    "deepseek-v3": {
        **_sizes(7168, 61, 128, 128, 18432, 129280),
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "attention_scale": 192**-0.5 * (0.1 * log(40.0) + 1) ** 2,
        "latent": {"q_rank": 1536, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128},
        **_mixture(
            256,
            8,
            2048,
            shared_ffn_hidden_size=2048,
            dense_layers=3,
            router="sigmoid",
            scale=2.5,
            groups=8,
            top_groups=4,
            bias_rate=0.001,
        ),
    },
    "gpt-oss-20b": {**_sizes(2880, 24, 64, 8, 2880, 201088), **_GPT_OSS, **_mixture(32, 4, 2880, biases=True)},
    "gpt-oss-120b": {**_sizes(2880, 36, 64, 8, 2880, 201088), **_GPT_OSS, **_mixture(128, 4, 2880, biases=True)},
    "gpt2-124m": {**_sizes(768, 12, 12, 12, 3072, 50257), **_GPT, "max_position": 1024},
    "gpt2-xl": {**_sizes(1600, 48, 25, 25, 6400, 50257), **_GPT, "max_position": 1024},
    "gpt3-175b": {**_sizes(12288, 96, 96, 96, 49152, 50257), **_GPT, "max_position": 2048},
    "megatron-1t": {**_sizes(25600, 128, 160, 160, 102400, 51200), **_GPT, "max_position": 2048},
}
