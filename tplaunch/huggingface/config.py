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
from tplaunch.recipe.schema import Model, RopeScaling

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
MISTRAL = Family("mistral", "MistralForCausalLM")  # written with a window only: else it is a Llama
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM")
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM")
READ = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GPT2)}

_NO_GEMMA_FIELDS: dict[str, Any] = {
    "norm_plus_one": False,
    "post_norms": False,
    "scale_embeddings": False,
    "window_rope_theta": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "attention_scale": None,
}
_NO_LAYER_FIELDS: dict[str, Any] = {"attention_sinks": False}
_LLAMA_FIELDS = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "linear_bias": False,
    **_NO_LAYER_FIELDS,
    **_NO_GEMMA_FIELDS,
}
_GEMMA_FIELDS = {
    "norm": "rmsnorm",
    "activation": "geglu",
    "position": "rope",
    "qkv_bias": False,
    "linear_bias": False,
    **_NO_LAYER_FIELDS,
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embeddings": True,
}
_GPT2_FIELDS = {
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "qkv_bias": True,
    "linear_bias": True,
    "qk_norm": False,
}
_GPT2_ALONE = {**_GPT2_FIELDS, "window": None, **_NO_LAYER_FIELDS, **_NO_GEMMA_FIELDS}
_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def family_of(model: Model) -> Family:
    """The architecture that computes what a model computes.

    Raises:
        TplaunchError: there is none; names the fields that stand in the way.
    """
    known = (("llama", _LLAMA_FIELDS), ("gpt2", _GPT2_ALONE), ("gemma2", _GEMMA_FIELDS))
    other = {name: _differing(model, fields) for name, fields in known}
    if not other["llama"]:
        windows = {model.window_of(layer) for layer in range(model.num_layers)}
        if model.qkv_bias and model.qk_norm:
            other["llama"] = ["qkv_bias together with qk_norm"]
        elif model.qkv_bias or model.qk_norm:
            return QWEN2 if model.qkv_bias else QWEN3
        elif len(windows) == 1:
            return LLAMA if None in windows else MISTRAL
        else:
            other["llama"] = ["window_layers"]
    if not other["gemma2"]:
        if _head_scalar(model) is None:
            other["gemma2"] = [f"attention_scale: {model.attention_scale}"]
        elif model.qk_norm:
            return GEMMA3
        elif model.window_rope_theta is None:
            return GEMMA2
        else:
            other["gemma2"] = ["window_rope_theta without qk_norm"]
    if not other["gpt2"]:
        assert model.head_dim is not None
        if model.num_kv_heads == model.num_heads and model.head_dim * model.num_heads == model.hidden_size:
            return GPT2
        other["gpt2"] = ["heads that do not share hidden_size among them"]
    nearest, fields = min(other.items(), key=lambda item: len(item[1]))
    raise TplaunchError(
        Problem("no architecture of transformers is this model", why=f"{nearest}, the nearest, has no {fields[0]}")
    )


def _head_scalar(model: Model) -> int | None:
    """Gemma's `query_pre_attn_scalar`: what 1 / sqrt is taken of, to scale scores; None where it is no whole number."""
    if model.attention_scale is None:
        return model.head_dim
    scalar = round(model.attention_scale**-2)
    return scalar if scalar and scalar**-0.5 == model.attention_scale else None


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
    scaling = None if model.rope_scaling is None else _scaling(model.rope_scaling)
    rope = {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})}
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
        "rope_parameters": rope,
        **(_windows(model, family, rope, seq_len)),
    }


def _scaling(ours: RopeScaling) -> Config:
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "linear": (), "yarn": _YARN}[ours.type]
    found = {"rope_type": ours.type, "factor": ours.factor, **{name: getattr(ours, name) for name in names}}
    if ours.type != "linear":
        found["original_max_position_embeddings"] = ours.original_max_position
    return {name: value for name, value in found.items() if value is not None}


_YARN = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_KINDS = {"window": "sliding_attention", "full": "full_attention"}


def _windows(model: Model, family: Family, rope: Config, seq_len: int) -> Config:
    """What is said of windows, and of what comes with them in Gemma."""
    types = [_KINDS["full" if model.window_of(i) is None else "window"] for i in range(model.num_layers)]
    if family == MISTRAL:
        return {"sliding_window": model.window}
    if family in (QWEN2, QWEN3) and _KINDS["window"] in types:
        return {
            "use_sliding_window": True,
            "sliding_window": model.window,
            "layer_types": types,
            "max_window_layers": types.index(_KINDS["window"]),
        }
    if family not in (GEMMA2, GEMMA3):
        return {}
    found: Config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _head_scalar(model),
        "attn_logit_softcapping": model.attention_softcap,
        "final_logit_softcapping": model.logit_softcap,
        "sliding_window": model.window or seq_len,
        "layer_types": types,
    }
    if family == GEMMA3:
        theta = model.window_rope_theta
        found["rope_local_base_freq"] = theta or model.rope_theta
        local = rope if theta is None else {"rope_type": "default", "rope_theta": theta}
        found["rope_parameters"] = {_KINDS["full"]: rope, _KINDS["window"]: local}
    return found


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
    if family != GPT2:
        found += _refused_layers(config, family)
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
_ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": (None, "default", "llama3", "linear", "yarn"),
    "partial_rotary_factor": (None, 1, 1.0),
}


def _refused(config: Config, allowed: dict[str, tuple[Any, ...]]) -> Iterable[str]:
    for key, values in allowed.items():
        if config.get(key) not in values:
            expected = " or ".join(str(value) for value in values if value is not None) or "absent"
            found = json.dumps(config[key]) if key in config else "absent"
            yield f"{key} is {found}, and must be {expected}"


def _rope(config: Config) -> Config:
    """The rotary parameters under the names of transformers 5, wherever the file has them."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if isinstance(full := new.get(_KINDS["full"]), dict):  # by kind of layer
        new = full
    found = {"rope_theta": config.get("rope_theta"), **old, **new}
    found["rope_type"] = found.get("rope_type") or found.get("type")
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return found


def _llama_fields(config: Config, family: Family) -> tuple[Config, int, dict[str, tuple[Any, ...]]]:
    rope = _rope(config)
    gemma = family in (GEMMA2, GEMMA3)
    fields = {
        "hidden_size": config.get("hidden_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads", 4 if gemma else None),
        "head_dim": config.get("head_dim", 256 if gemma else None),
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta") or (1e6 if family == GEMMA3 else 10000.0),
        "rope_scaling": _read_scaling(rope, config),
        "qkv_bias": family == QWEN2,
        "qk_norm": family in (QWEN3, GEMMA3),
        "tie_embeddings": config.get("tie_word_embeddings", gemma),
        "init_std": config.get("initializer_range", 0.02),
        **_read_windows(config, family),
        **(_read_gemma(config, family) if gemma else {}),
    }
    allowed = {
        **_ANY_FAMILY,
        **(
            {"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)}
            if gemma
            else {"hidden_act": (None, "silu", "swish")}
        ),
        "attention_bias": (None, False, True) if family == QWEN2 else (None, False),
        "mlp_bias": (None, False),
    }
    most = {GEMMA2: 8192, GEMMA3: 131_072}.get(family, 2048)
    return fields, config.get("max_position_embeddings", most), allowed


def _read_scaling(rope: Config, config: Config) -> Config | None:
    kind = rope["rope_type"]
    names: dict[str, tuple[str, ...]] = {
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "linear": ("factor",),
        "yarn": ("factor", *_YARN),
    }
    if kind not in names:
        return None
    found = {name: rope[name] for name in names[kind] if rope.get(name) is not None}
    first = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if kind == "yarn":
        first = first or config.get("max_position_embeddings")
    if kind != "linear" and first is not None:
        found["original_max_position"] = first
    return found if kind == "llama3" else {"type": kind, **found}


def _layer_types(config: Config, family: Family) -> list[str] | None:
    """The kind of each layer, in a family whose layers differ; None where none has a window."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or family == LLAMA:
        return None
    if family == MISTRAL:
        return [_KINDS["window"]] * layers if config.get("sliding_window", 4096) is not None else None
    if family in (QWEN2, QWEN3) and not (config.get("use_sliding_window") and config.get("sliding_window", 4096)):
        return None
    if isinstance(said := config.get("layer_types"), list):
        return said
    if family in (GEMMA2, GEMMA3):
        every = 2 if family == GEMMA2 else config.get("sliding_window_pattern", 6)
        return [_KINDS["window" if (i + 1) % every else "full"] for i in range(layers)]
    first = config.get("max_window_layers", 28)
    return [_KINDS["window" if i >= first else "full"] for i in range(layers)]


def _refused_layers(config: Config, family: Family) -> Iterable[str]:
    types, layers = _layer_types(config, family), config.get("num_hidden_layers")
    if types is not None:
        if other := [kind for kind in types if kind not in _KINDS.values()]:
            yield f"layer_types has {json.dumps(other[0])}, and must have {' or '.join(_KINDS.values())}"
        if len(types) != layers:
            yield f"layer_types has {len(types)} layers, and num_hidden_layers is {layers}"
    local = (config.get("rope_parameters") or {}).get(_KINDS["window"])
    if family == GEMMA3 and isinstance(local, dict) and local != (config["rope_parameters"].get(_KINDS["full"])):
        yield from (f"{_KINDS['window']}: {text}" for text in _refused(local, {"rope_type": (None, "default")}))


def _read_windows(config: Config, family: Family) -> Config:
    types = _layer_types(config, family)
    if types is None or _KINDS["window"] not in types:
        return {}
    kinds = ["window" if kind == _KINDS["window"] else "full" for kind in types]
    length = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    found = {"window": config.get("sliding_window", 4096)}
    return found if length == 1 else {**found, "window_layers": kinds[:length]}


def _read_gemma(config: Config, family: Family) -> Config:
    scalar = config.get("query_pre_attn_scalar", 256)
    fields = {
        name: _GEMMA_FIELDS[name] for name in ("activation", "norm_plus_one", "post_norms", "scale_embeddings")
    } | {
        "attention_softcap": config.get("attn_logit_softcapping", 50.0 if family == GEMMA2 else None),
        "logit_softcap": config.get("final_logit_softcapping", 30.0 if family == GEMMA2 else None),
    }
    if isinstance(scalar, (int, float)) and scalar > 0 and scalar != config.get("head_dim", 256):
        fields["attention_scale"] = scalar**-0.5
    if family == GEMMA3 and _KINDS["window"] in (_layer_types(config, family) or ()):
        parameters = config.get("rope_parameters") or {}
        local = parameters.get(_KINDS["window"]) or {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        if local != parameters.get(_KINDS["full"]):
            fields["window_rope_theta"] = local.get("rope_theta", 10000.0)
    return fields


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
