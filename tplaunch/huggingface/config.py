"""A model as a `config.json` of transformers says it, and back. Torch-free.

Written are the keys of transformers 5 (`rope_parameters`, `dtype`) and those of 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`), which vLLM, TensorRT-LLM and published models use; either is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Model

Config = dict[str, Any]
CONFIG = "config.json"


class Family(NamedTuple):
    """An architecture of transformers: its `model_type` and its class."""

    model_type: str
    architecture: str


GPT2 = Family("gpt2", "GPT2LMHeadModel")
LLAMA = Family("llama", "LlamaForCausalLM")
QWEN2 = Family("qwen2", "Qwen2ForCausalLM")
QWEN3 = Family("qwen3", "Qwen3ForCausalLM")
MISTRAL = Family("mistral", "MistralForCausalLM")  # read only: what it computes, Llama computes too
READ = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)}

_LLAMA_FIELDS = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "linear_bias": False}
_GPT2_FIELDS = {
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "qkv_bias": True,
    "linear_bias": True,
    "qk_norm": False,
}
_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def family_of(model: Model) -> Family:
    """The architecture that computes what a model computes.

    Raises:
        TplaunchError: there is none; names the fields that stand in the way.
    """
    other = {name: _differing(model, fields) for name, fields in (("llama", _LLAMA_FIELDS), ("gpt2", _GPT2_FIELDS))}
    if not other["llama"]:
        if not (model.qkv_bias and model.qk_norm):
            return QWEN2 if model.qkv_bias else QWEN3 if model.qk_norm else LLAMA
        other["llama"] = ["qkv_bias together with qk_norm"]
    if not other["gpt2"]:
        assert model.head_dim is not None
        if model.num_kv_heads == model.num_heads and model.head_dim * model.num_heads == model.hidden_size:
            return GPT2
        other["gpt2"] = ["heads that do not share hidden_size among them"]
    nearest, fields = min(other.items(), key=lambda item: len(item[1]))
    raise TplaunchError(
        Problem("no architecture of transformers is this model", why=f"{nearest}, the nearest, has no {fields[0]}")
    )


def _differing(model: Model, fields: dict[str, Any]) -> list[str]:
    return [f"{name}: {getattr(model, name)}" for name, value in fields.items() if getattr(model, name) != value]


def write_config(model: Model, *, seq_len: int, precision: str, eod: int | None) -> Config:
    """What `config.json` says of a model.

    Args:
        seq_len: positions it was trained on.
        precision: of the weights that lie beside it: fp64, fp32, bf16 or fp16.
        eod: the token that ends a document, where it is known.

    Raises:
        TplaunchError: see `family_of`.
    """
    family = family_of(model)
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": eod if family == GPT2 else None,
        "eos_token_id": eod,
        "use_cache": True,
        "dtype": _DTYPES[precision],
        "torch_dtype": _DTYPES[precision],
    }
    if family == GPT2:
        return {
            **common,
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": model.max_position,
            "n_ctx": model.max_position,
            "layer_norm_epsilon": model.norm_eps,
            "activation_function": "gelu_new",
            **{name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")},
        }
    scaling = None
    if (ours := model.rope_scaling) is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": ours.factor,
            "low_freq_factor": ours.low_freq_factor,
            "high_freq_factor": ours.high_freq_factor,
            "original_max_position_embeddings": ours.original_max_position,
        }
    return {
        **common,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": seq_len,
        "hidden_act": "silu",
        "attention_bias": model.qkv_bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})},
    }


class Read(NamedTuple):
    """What a `config.json` says.

    Args:
        family: the architecture.
        model: as a recipe says it.
        seq_len: positions that it can take.
    """

    family: Family
    model: Model
    seq_len: int


def is_model_folder(path: Path) -> bool:
    """Whether a path is a Hugging Face folder."""
    return (path / CONFIG).is_file()


def read_config(path: Path) -> Read:
    """Read a `config.json`.

    Raises:
        TplaunchError: it cannot be read, or its model does something that tplaunch's does not; all such things at once.
    """
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TplaunchError(Problem(f"{path} cannot be read", why=str(error), fix="name a folder with one")) from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in READ:
        known = ", ".join(READ)
        raise TplaunchError(Problem(f"{path}: model_type {kind!r} is none that tplaunch has", fix=f"known: {known}"))
    if bad := [key for key in ("rope_scaling", "rope_parameters") if not isinstance(config.get(key) or {}, dict)]:
        raise TplaunchError(Problem(f"{path}: {bad[0]} must be a mapping"))
    family = READ[kind]
    fields, seq_len, allowed = _gpt2_fields(config) if family == GPT2 else _llama_fields(config, family)
    found = [*_refused(config, allowed), *(() if family == GPT2 else _refused(_rope(config), _ROPE))]
    if type(seq_len) is not int or seq_len < 1:
        found.append(f"the most positions are {json.dumps(seq_len)}, and must be a number")
    if found:
        why = "the model would compute something else here"
        raise TplaunchError(*(Problem(f"{path}: {text}", why=why) for text in found))
    try:
        return Read(family, Model.model_validate(fields), seq_len)
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise TplaunchError(*(Problem(f"{path}: {text}") for text in texts)) from None


# Key -> values that say what our model does; None stands for a missing key, too.
_ANY_FAMILY: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "add_cross_attention": (None, False)}
_ROPE: dict[str, tuple[Any, ...]] = {"rope_type": (None, "default", "llama3"), "partial_rotary_factor": (None, 1, 1.0)}


def _refused(config: Config, allowed: dict[str, tuple[Any, ...]]) -> Iterable[str]:
    for key, values in allowed.items():
        if config.get(key) not in values:
            expected = " or ".join(str(value) for value in values if value is not None) or "absent"
            found = json.dumps(config[key]) if key in config else "absent"
            yield f"{key} is {found}, and must be {expected}"


def _rope(config: Config) -> Config:
    """The rotary parameters under the names of transformers 5, wherever the file has them."""
    old = config.get("rope_scaling") or {}
    found = {"rope_theta": config.get("rope_theta"), **old, **(config.get("rope_parameters") or {})}
    found["rope_type"] = found.get("rope_type") or found.get("type")
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return found


def _llama_fields(config: Config, family: Family) -> tuple[Config, int, dict[str, tuple[Any, ...]]]:
    rope = _rope(config)
    scaling = None
    if rope["rope_type"] == "llama3":
        names = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
        names["original_max_position"] = "original_max_position_embeddings"
        scaling = {ours: rope[theirs] for ours, theirs in names.items() if theirs in rope}
    fields = {
        "hidden_size": config.get("hidden_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or 10000.0,
        "rope_scaling": scaling,
        "qkv_bias": family == QWEN2,
        "qk_norm": family == QWEN3,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
    }
    windows = family == MISTRAL or config.get("use_sliding_window")
    allowed = {
        **_ANY_FAMILY,
        "hidden_act": (None, "silu", "swish"),
        "attention_bias": (None, False, True) if family == QWEN2 else (None, False),
        "mlp_bias": (None, False),
        **({"sliding_window": (None,)} if windows else {}),
    }
    return fields, config.get("max_position_embeddings", 2048), allowed


def _gpt2_fields(config: Config) -> tuple[Config, int, dict[str, tuple[Any, ...]]]:
    hidden, positions = config.get("n_embd"), config.get("n_positions", 1024)
    fields = {
        "hidden_size": hidden,
        "num_layers": config.get("n_layer"),
        "num_heads": config.get("n_head"),
        "ffn_hidden_size": config.get("n_inner") or (4 * hidden if isinstance(hidden, int) else None),
        "vocab_size": config.get("vocab_size"),
        "max_position": positions,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "init_std": config.get("initializer_range", 0.02),
        **_GPT2_FIELDS,
    }
    allowed = {
        **_ANY_FAMILY,
        "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"),  # gelu_new is its default
        "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False),
    }
    return fields, positions, allowed
