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
from tplaunch.huggingface.experts import Config, allowed_of_experts, read_experts, write_experts
from tplaunch.huggingface.families import (
    BIASES,
    DEEPSEEK_V3,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT2_OWN,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    HAS,
    MISTRAL,
    MIXTRAL,
    NEOX_OWN,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    READ,
    SMOLLM3,
    Family,
    family_of,
    head_scalar,
)
from tplaunch.recipe.schema import Model, RopeScaling

CONFIG = "config.json"
_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
    if "rotary_fraction" in HAS[family].free:
        rope["partial_rotary_factor"] = model.rotary_fraction
    if family == GPT_NEOX:
        return {
            **common,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "layer_norm_eps": model.norm_eps,
            "max_position_embeddings": seq_len,
            "hidden_act": "gelu",
            "attention_bias": model.qkv_bias,
            "use_parallel_residual": model.parallel_residual,
            **{name: 0.0 for name in ("attention_dropout", "hidden_dropout")},
            "rotary_emb_base": model.rope_theta,
            "rotary_pct": model.rotary_fraction,
            "rope_scaling": scaling,
            "rope_parameters": rope,
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
        "mlp_bias": "mlp_bias" in HAS[family].free and model.biased_mlp,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        **(_windows(model, family, rope, seq_len)),
        **(_own(model, family, seq_len)),
        **({"pad_token_id": None} if family in (SMOLLM3, OLMO2, PHI3) else {}),  # else a number, maybe beyond the table
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
    if family in (MISTRAL, PHI3, MIXTRAL):
        return {"sliding_window": model.window}
    if family == QWEN3_MOE:
        return {"use_sliding_window": model.window is not None, "sliding_window": model.window}
    if family == GPT_OSS:
        return {"sliding_window": model.window or seq_len, "layer_types": types}
    if family in (QWEN2, QWEN3, SMOLLM3) and _KINDS["window"] in types:
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
        "query_pre_attn_scalar": head_scalar(model),
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


def _own(model: Model, family: Family, seq_len: int) -> Config:
    """What one family alone says."""
    if family == GRANITE:
        assert model.head_dim is not None
        return {
            "embedding_multiplier": model.embedding_multiplier,
            "attention_multiplier": model.attention_scale or model.head_dim**-0.5,
            "residual_multiplier": model.residual_multiplier,
            "logits_scaling": model.logit_divisor,
        }
    if family == SMOLLM3:
        return {"no_rope_layers": [int(model.turns(layer)) for layer in range(model.num_layers)]}
    if family == PHI3:
        return {
            "original_max_position_embeddings": seq_len,
            "partial_rotary_factor": model.rotary_fraction,
            **{name: 0.0 for name in ("embd_pdrop", "resid_pdrop")},
        }
    if model.moe is not None:
        return write_experts(model, model.moe, family)
    return {}


class Read(NamedTuple):
    """What a `config.json` says.

    Args:
        family: the architecture.
        model: as a recipe says it.
        seq_len: positions that it can take.
        left_out: how tensors begin that the files may have and the model has not: those that predict further tokens.
    """

    family: Family
    model: Model
    seq_len: int
    left_out: tuple[str, ...] = ()


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
    _refuse_quantized(path, config)
    family = READ[kind]
    read = {GPT2: _gpt2_fields, GPT_NEOX: _neox_fields}.get(family)
    fields, seq_len, allowed = _llama_fields(config, family) if read is None else read(config)
    found = [*_refused(config, allowed), *(() if family == GPT2 else _refused(_rope(config), _rotary(family)))]
    if family != GPT2:
        found += _refused_layers(config, family)
    if type(seq_len) is not int or seq_len < 1:
        found.append(f"the most positions are {json.dumps(seq_len)}, and must be a number")
    if found:
        why = "the model would compute something else here"
        raise TplaunchError(*(Problem(f"{path}: {text}", why=why) for text in found))
    try:
        model = Model.model_validate(fields)
        if family_of(model) != family:
            model = Model.model_validate({**fields, "family": family.model_type})
        return Read(family, model, seq_len, _left_out(config, family, model.num_layers))
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise TplaunchError(*(Problem(f"{path}: {text}") for text in texts)) from None


def _left_out(config: Config, family: Family, layers: int) -> tuple[str, ...]:
    if family != DEEPSEEK_V3:
        return ()
    more = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    return tuple(f"model.layers.{layers + i}." for i in range(more if isinstance(more, int) else 1))


# Key -> values that say what our model does; None stands for a missing key, too.
_ANY_FAMILY: dict[str, tuple[Any, ...]] = {"add_cross_attention": (None, False)}
# How transformers makes floating-point numbers of what is quantized.
_DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}


def _refuse_quantized(path: Path, config: Config) -> None:
    said = config.get("quantization_config")
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, dict) else None
    fix = "import the model before it was quantized"
    if method in _DEQUANTIZED:
        whole = f"quantization_config={_DEQUANTIZED[method]}(dequantize=True), dtype='bfloat16'"
        needs = " (needs accelerate)" if method == "fp8" else ""
        fix = f"with transformers{needs}: AutoModelForCausalLM.from_pretrained(FOLDER, {whole}).save_pretrained(NEW)"
    why = "quantized weights cannot be trained"
    raise TplaunchError(Problem(f"{path}: quantization_config is {method or json.dumps(said)}", why=why, fix=fix))


def _rotary(family: Family) -> dict[str, tuple[Any, ...]]:
    """As above, of the rotary parameters."""
    scaled: tuple[str, ...] = ("llama3", "linear", "yarn") if "rope_scaling" in HAS[family].free else ()
    if family == DEEPSEEK_V3:
        scaled = ("yarn",)
    whole = {} if "rotary_fraction" in HAS[family].free else {"partial_rotary_factor": (None, 1, 1.0)}
    return {"rope_type": (None, "default", *scaled), **whole}


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
    if config["model_type"] == GPT_OSS.model_type and not old and not new:
        new = _GPT_OSS_ROPE
    found = {"rope_theta": config.get("rope_theta"), **old, **new}
    if found["rope_theta"] is None:
        found["rope_theta"] = config.get("rotary_emb_base")
    found["rope_type"] = found.get("rope_type") or found.get("type")
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return found


# What its class makes of a file that says nothing.
_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_THETA = {GEMMA3: 1e6, SMOLLM3: 2e6, MIXTRAL: 1e6, GPT_OSS: 150_000.0}


def _llama_fields(config: Config, family: Family) -> tuple[Config, int, dict[str, tuple[Any, ...]]]:
    rope, has = _rope(config), HAS[family]
    scaling = _read_scaling(rope, config)
    gemma = family in (GEMMA2, GEMMA3)
    fields = {
        "hidden_size": config.get("hidden_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads", 4 if gemma else None),
        "head_dim": config.get("head_dim", 256 if gemma else {GPT_OSS: 64}.get(family)),
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "norm_eps": config.get("rms_norm_eps", 1e-5 if family in (OLMO2, PHI3, MIXTRAL, GPT_OSS) else 1e-6),
        "rope_theta": rope.get("rope_theta") or _THETA.get(family, 10000.0),
        "rope_scaling": scaling,
        "tie_embeddings": config.get("tie_word_embeddings", gemma or family == SMOLLM3),
        "init_std": config.get("initializer_range", 0.02),
        **{name: value for name, value in has.own.items() if "." not in name},
        **_read_biases(config, family),
        **_read_windows(config, family),
        **_read_own(config, family, rope),
        **(_read_gemma(config, family) if gemma else {}),
        **(read_experts(config, family, scaling) if "moe" in has.free else {}),
    }
    allowed = {
        **_ANY_FAMILY,
        **(
            {"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)}
            if gemma
            else {"hidden_act": (None, "silu", "swish")}
        ),
        "attention_bias": (None, False, True) if family == QWEN2 or has.free >= BIASES else (None, False),
        "mlp_bias": (None, False, True) if "mlp_bias" in has.free and family != OLMO2 else (None, False),
        **allowed_of_experts(config, family),
    }
    most = {GEMMA2: 8192, GEMMA3: 131_072, SMOLLM3: 32768, PHI3: 4096}
    most |= {MIXTRAL: 131_072, GPT_OSS: 131_072, QWEN3_MOE: 32768, DEEPSEEK_V3: 4096}
    return fields, config.get("max_position_embeddings", most.get(family, 2048)), allowed


def _read_biases(config: Config, family: Family) -> Config:
    if not HAS[family].free >= BIASES:
        return {}
    if family == GPT_OSS:
        return dict.fromkeys(("qkv_bias", "linear_bias"), bool(config.get("attention_bias", True)))
    attention, mlp = (bool(config.get(f"{name}_bias", False)) for name in ("attention", "mlp"))
    return {"qkv_bias": attention, "linear_bias": attention, "mlp_bias": mlp and family != OLMO2}


def _read_own(config: Config, family: Family, rope: Config) -> Config:
    """What one family alone says."""
    if family == GRANITE:
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        scale = config.get("attention_multiplier", 1.0)
        usual = None
        if isinstance(heads, int) and isinstance(hidden, int) and 0 < heads <= hidden:
            usual = (config.get("head_dim") or hidden // heads) ** -0.5
        return {
            "embedding_multiplier": config.get("embedding_multiplier", 1.0),
            "residual_multiplier": config.get("residual_multiplier", 1.0),
            "logit_divisor": config.get("logits_scaling", 1.0),
            "attention_scale": None if scale == usual else scale,
        }
    if family == SMOLLM3:
        turns = _no_rope_layers(config)
        return (
            {}
            if turns is None or all(turns)
            else {"rope_layers": _repeated(["rope" if on else "none" for on in turns])}
        )
    if family == PHI3:
        return {"rotary_fraction": rope.get("partial_rotary_factor") or 1.0}
    return {}


def _no_rope_layers(config: Config) -> list[Any] | None:
    """Of each layer of SmolLM3, whether it turns (not what the key's name says); None where it cannot be told."""
    layers, every = config.get("num_hidden_layers"), config.get("no_rope_layer_interval", 4)
    said = config.get("no_rope_layers")
    if not isinstance(layers, int) or not isinstance(every, int) or every < 1:
        return None
    if said is None:
        return [int((layer + 1) % every != 0) for layer in range(layers)]
    return said if isinstance(said, list) else None


def _repeated(kinds: list[str]) -> list[str]:
    """The shortest beginning of a list that, repeated, is all of it."""
    length = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return kinds[:length]


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
    if not isinstance(layers, int) or "window" not in HAS[family].free:
        return None
    if family in (MISTRAL, PHI3, MIXTRAL, QWEN3_MOE):
        window = config.get("sliding_window", 4096 if family in (MISTRAL, QWEN3_MOE) else None)
        if family == QWEN3_MOE and not config.get("use_sliding_window"):
            window = None
        return [_KINDS["window"]] * layers if window is not None else None
    window = config.get("sliding_window", None if family == SMOLLM3 else 4096)
    if family in (QWEN2, QWEN3, SMOLLM3) and not (config.get("use_sliding_window") and window):
        return None
    if isinstance(said := config.get("layer_types"), list):
        return said
    if family in (GEMMA2, GEMMA3, GPT_OSS):
        every = config.get("sliding_window_pattern", 6) if family == GEMMA3 else 2
        return [_KINDS["window" if (i + 1) % every else "full"] for i in range(layers)]
    if family == SMOLLM3:
        return [_KINDS["full" if turns else "window"] for turns in _no_rope_layers(config) or ()]
    first = config.get("max_window_layers", 28)
    return [_KINDS["window" if i >= first else "full"] for i in range(layers)]


def _refused_layers(config: Config, family: Family) -> Iterable[str]:
    types, layers = _layer_types(config, family), config.get("num_hidden_layers")
    if family == SMOLLM3:
        turns = _no_rope_layers(config)
        if turns is None or len(turns) != layers or any(on not in (0, 1) for on in turns):
            yield f"no_rope_layers must be a list of 0 and 1, one for each of {layers} layers"
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
    usual = 128 if family == GPT_OSS else 4096
    found, kinds = {"window": config.get("sliding_window", usual)}, _repeated(kinds)
    return found if len(kinds) == 1 else {**found, "window_layers": kinds}


def _read_gemma(config: Config, family: Family) -> Config:
    scalar = config.get("query_pre_attn_scalar", 256)
    fields = {
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
        **GPT2_OWN,
    }
    allowed = {
        **_ANY_FAMILY,
        "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"),  # gelu_new is its default
        "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False),
    }
    return fields, positions, allowed


def _neox_fields(config: Config) -> tuple[Config, int, dict[str, tuple[Any, ...]]]:
    rope, biased = _rope(config), bool(config.get("attention_bias", True))
    fraction = rope.get("partial_rotary_factor")
    fields = {
        "hidden_size": config.get("hidden_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": config.get("num_attention_heads"),
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "rope_theta": rope.get("rope_theta") or 10000.0,
        "rope_scaling": _read_scaling(rope, config),
        "rotary_fraction": config.get("rotary_pct", 0.25) if fraction is None else fraction,
        "parallel_residual": config.get("use_parallel_residual", True),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "init_std": config.get("initializer_range", 0.02),
        "qkv_bias": biased,
        "linear_bias": biased,
        "mlp_bias": True,
        **NEOX_OWN,
    }
    allowed = {
        **_ANY_FAMILY,
        "hidden_act": (None, "gelu"),
        "attention_bias": (None, False, True),
    }
    return fields, config.get("max_position_embeddings", 2048), allowed
