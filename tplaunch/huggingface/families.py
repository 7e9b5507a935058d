"""The architectures of transformers that are read and written, as fields of `model`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from math import isclose, log
from typing import Any, NamedTuple

from pydantic import BaseModel

from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.schema import Model


class Family(NamedTuple):
    """An architecture of transformers: its `model_type` and its class, and what its models are called."""

    model_type: str
    architecture: str
    models: str


GPT2 = Family("gpt2", "GPT2LMHeadModel", "GPT-2")
LLAMA = Family("llama", "LlamaForCausalLM", "Llama 2 and 3")
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2 and 2.5")
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3")
MISTRAL = Family("mistral", "MistralForCausalLM", "Mistral")
GRANITE = Family("granite", "GraniteForCausalLM", "Granite 3")
SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3")
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", "OLMo 2")
PHI3 = Family("phi3", "Phi3ForCausalLM", "Phi-3 and Phi-4")
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", "Gemma 2")
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", "Gemma 3 (text)")
GPT_NEOX = Family("gpt_neox", "GPTNeoXForCausalLM", "GPT-NeoX and Pythia")
MIXTRAL = Family("mixtral", "MixtralForCausalLM", "Mixtral")
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3-MoE")
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", "DeepSeek-V3 and R1")
GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", "gpt-oss")
_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, SMOLLM3, OLMO2, PHI3, GEMMA2, GEMMA3, GPT_NEOX, GPT2)
_ALL = (*_DENSE, MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT_OSS)
READ = {family.model_type: family for family in _ALL}

# What decides how a model computes, and differs among families; what is not here, all have. Of a section that a model
# has not, no field decides anything.
_FIELDS = {
    *("moe", "latent", "moe.shared_ffn_hidden_size", "moe.dense_layers", "moe.router", "moe.normalize", "moe.scale"),
    *("moe.groups", "moe.top_groups", "moe.bias_rate", "moe.biases"),
    *("norm", "activation", "position", "qkv_bias", "linear_bias", "mlp_bias", "qk_norm", "qk_norm_all_heads"),
    *("attention_sinks", "norm_plus_one", "pre_norms", "post_norms", "parallel_residual", "scale_embeddings"),
    *("rotary_fraction", "rope_layers", "rope_scaling", "window", "window_layers", "window_rope_theta"),
    *("attention_softcap", "logit_softcap", "attention_scale"),
    *("embedding_multiplier", "residual_multiplier", "logit_divisor"),
}
BIASES = {"qkv_bias", "linear_bias"}  # one key in their files


class Has(NamedTuple):
    """What a family's models are.

    Args:
        own: fields that are so in all of them; what is in neither has its default.
        free: fields that are told by a model's `config.json`.
    """

    own: dict[str, Any]
    free: set[str]


_GEMMA_OWN = {
    "activation": "geglu",
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embeddings": True,
}
NEOX_OWN = {"norm": "layernorm", "activation": "gelu_exact"}
GPT2_OWN = {
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "qkv_bias": True,
    "linear_bias": True,
}
_WINDOWS = {"window", "window_layers"}
_GEMMA_FREE = {*_WINDOWS, "rope_scaling", "attention_softcap", "logit_softcap", "attention_scale"}
HAS = {
    LLAMA: Has({}, {*BIASES, "mlp_bias", "rope_scaling"}),
    MISTRAL: Has({}, {"window", "rope_scaling"}),
    QWEN2: Has({"qkv_bias": True}, {*_WINDOWS, "rope_scaling"}),
    QWEN3: Has({"qk_norm": True}, {*_WINDOWS, "rope_scaling"}),
    GRANITE: Has(
        {},
        {*BIASES, "mlp_bias", "rope_scaling", "attention_scale"}
        | {"embedding_multiplier", "residual_multiplier", "logit_divisor"},
    ),
    SMOLLM3: Has({}, {*BIASES, *_WINDOWS, "mlp_bias", "rope_scaling", "rope_layers"}),
    OLMO2: Has(
        {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_all_heads": True},
        {*BIASES, "mlp_bias", "rope_scaling"},
    ),
    PHI3: Has({}, {"window", "rotary_fraction"}),
    GEMMA2: Has(_GEMMA_OWN, _GEMMA_FREE),
    GEMMA3: Has({**_GEMMA_OWN, "qk_norm": True}, {*_GEMMA_FREE, "window_rope_theta"}),
    GPT_NEOX: Has(NEOX_OWN, {*BIASES, "mlp_bias", "rope_scaling", "rotary_fraction", "parallel_residual"}),
    GPT2: Has(GPT2_OWN, {"rope_scaling"}),
    MIXTRAL: Has({}, {"moe", "window", "rope_scaling"}),
    QWEN3_MOE: Has(
        {"qk_norm": True},
        {*BIASES, "mlp_bias", "moe", "moe.dense_layers", "moe.normalize", "window", "rope_scaling"},
    ),
    DEEPSEEK_V3: Has(
        {"moe.router": "sigmoid"},
        {"moe", "latent", "attention_scale", "rope_scaling", "moe.shared_ffn_hidden_size", "moe.dense_layers"}
        | {"moe.normalize", "moe.scale", "moe.groups", "moe.top_groups", "moe.bias_rate"},
    ),
    GPT_OSS: Has(
        {"activation": "swiglu_clamped", "attention_sinks": True, "moe.biases": True},
        {*BIASES, *_WINDOWS, "moe", "rope_scaling"},
    ),
}


def family_of(model: Model) -> Family:
    """The architecture that computes what a model computes: the one that it names, or the first that does.

    Raises:
        TplaunchError: there is none, or not the one that it names; names what stands in the way.
    """
    asked = _ALL if model.family is None else (READ[model.family],)
    other = {family: list(_in_the_way(model, family)) for family in asked}
    family = min(asked, key=lambda family: len(other[family]))
    if not other[family]:
        return family
    what, nearest = "no architecture of transformers is this model", f"{family.model_type}, the nearest,"
    if model.family is not None:
        what, nearest = f"{model.family} of transformers is not this model", family.model_type
    raise TplaunchError(Problem(what, why=f"{nearest} has no {other[family][0]}"))


def _in_the_way(model: Model, family: Family) -> Iterable[str]:
    """The fields of a model that a family has not."""
    has = HAS[family]
    for name in sorted(_FIELDS - has.free):
        section, _, field = name.rpartition(".")
        said = getattr(model, section) if section else model
        if said is None:
            continue
        value, default = getattr(said, field), type(said).model_fields[field].default
        if value != has.own.get(name, default):
            yield name if isinstance(value, BaseModel) else f"{name}: {value}"
    yield from _in_the_way_of_experts(model, family)
    biased = (model.qkv_bias, model.linear_bias)
    if has.free >= BIASES and biased[0] != biased[1]:
        yield f"{'qkv_bias' if biased[0] else 'linear_bias'} alone"
    if family == OLMO2 and model.biased_mlp:
        yield "biases on the MLP"
    if family == GPT_NEOX and not model.biased_mlp:
        yield "MLP without biases"
    if "window_layers" not in has.free and len({model.window_of(layer) for layer in range(model.num_layers)}) > 1:
        yield "window_layers"
    if family in (GEMMA2, GEMMA3) and head_scalar(model) is None:
        yield f"attention_scale: {model.attention_scale}"
    shared = model.head_dim is None or model.head_dim * model.num_heads == model.hidden_size  # None: a check says why
    if family in (GPT2, GPT_NEOX) and not (shared and model.num_kv_heads == model.num_heads):
        yield "heads that do not share hidden_size among them"


def _in_the_way_of_experts(model: Model, family: Family) -> Iterable[str]:
    """What of experts and of latent attention a family has otherwise."""
    if "moe" not in HAS[family].free:
        return
    moe, latent = model.moe, model.latent
    if moe is None:
        yield "model without experts"
    elif family == QWEN3_MOE and moe.dense_layers and model.biased_mlp:
        yield "biases on the MLP"
    if family != DEEPSEEK_V3:
        return
    if latent is None:
        yield "attention that is not latent"
    elif not isclose(model.attention_scale or plain_scale(model.head_dim), _scale_of_scores(model)):
        yield f"attention_scale: {model.attention_scale}"
    if moe is not None:
        shared = moe.shared_ffn_hidden_size
        if moe.bias_rate is None or shared is None or shared % moe.ffn_hidden_size:
            yield "moe without bias_rate" if moe.bias_rate is None else f"moe.shared_ffn_hidden_size: {shared}"


def plain_scale(head_dim: int | None) -> float:
    return 1.0 if head_dim is None else head_dim**-0.5  # None: a check says why


def _scale_of_scores(model: Model) -> float:
    """What DeepSeek's code makes of a model's rotary scaling."""
    scaling = model.rope_scaling
    if scaling is None:
        return plain_scale(model.head_dim)
    return latent_scale(model.head_dim, scaling.mscale_all_dim, scaling.factor)


def latent_scale(head_dim: int | None, weight: float | None, factor: float) -> float:
    """Factor of scores in latent attention: YaRN's temperature is that of all channels of a head, where few are turned
    (`mscale_all_dim`, once for queries and once for keys)."""
    return plain_scale(head_dim) * (0.1 * weight * log(factor) + 1 if weight and factor > 1 else 1.0) ** 2


def head_scalar(model: Model) -> int | None:
    """Gemma's `query_pre_attn_scalar`: what 1 / sqrt is taken of, to scale scores; None where it is no whole number."""
    if model.attention_scale is None:
        return model.head_dim
    scalar = round(model.attention_scale**-2)
    return scalar if scalar and scalar**-0.5 == model.attention_scale else None
