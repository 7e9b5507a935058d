"""Published model sizes, by name: what `model.preset` fills in beneath the fields that a recipe states.

Each is the model's own config.json (GPT-3: Brown et al. 2020, table 2.1; Megatron 1T: Narayanan et al. 2021, table 1).
`vocab_size` is the published one; padding comes on top.
"""

from __future__ import annotations

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
_GPT = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "position": "learned",
    "qkv_bias": True,
    "linear_bias": True,
    "tie_embeddings": True,
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
    "gpt2-124m": {**_sizes(768, 12, 12, 12, 3072, 50257), **_GPT, "max_position": 1024},
    "gpt2-xl": {**_sizes(1600, 48, 25, 25, 6400, 50257), **_GPT, "max_position": 1024},
    "gpt3-175b": {**_sizes(12288, 96, 96, 96, 49152, 50257), **_GPT, "max_position": 2048},
    "megatron-1t": {**_sizes(25600, 128, 160, 160, 102400, 51200), **_GPT, "max_position": 2048},
}
