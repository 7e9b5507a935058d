"""The recipe as typed data. Field names are public: they are the keys of the YAML file.

Only shape and single-value rules live here; rules between fields live in `tplaunch.check.recipe`,
and reading files (extends, --set, positions, presets) in `tplaunch.recipe.load`.
"""

# No `from __future__ import annotations` here: pydantic would parse every one of them again at each start.

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from tplaunch.units import (
    Length,
    format_slurm_memory,
    format_slurm_time,
    parse_count,
    parse_duration,
    parse_length,
    parse_slurm_memory,
    parse_slurm_time,
)

# Bounds that no real run reaches; they turn a slip of the keyboard into a message.
Small = Annotated[int, Field(ge=1, le=10**6)]
Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Unit:
    """Lets a number be written as text with a unit, such as `example`, and says so in the JSON Schema."""

    parse: Callable[[str], float]
    example: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: self.parse(value) if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text = {"type": "string", "description": f'text such as "{self.example}"', "examples": [self.example]}
        return {"anyOf": [handler(schema), text]}


def _parse_samples(text: str) -> int:
    return parse_count(text.strip().removesuffix("samples"))


Count = Annotated[int, Field(ge=1, le=10**15), Unit(parse_count, "1B")]
BatchSize = Annotated[int, Field(ge=1, le=10**6), Unit(_parse_samples, "4Mi tokens")]
Seconds = Annotated[float, Field(gt=0, le=10**9), Unit(parse_duration, "2h")]


@dataclass(frozen=True)
class LengthOfRun:
    """Reads a part of a run: a number of steps, or text that says the unit; and writes it back so.

    Args:
        least: smallest amount.
    """

    least: int

    def _read(self, value: Any) -> Length:
        length = parse_length(value)
        if not (self.least <= length.amount <= 10**15) or (self.least and not length):
            raise ValueError(f"must be from {self.least:,} to {10**15:,}")
        return length

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(
            lambda length: length.amount if length.unit == "steps" else str(length)
        )
        return core_schema.no_info_plain_validator_function(self._read, serialization=written)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        examples = ["2B tokens", "4M samples", "10%"]
        text = {
            "type": "string",
            "description": 'text such as "2B tokens", "4M samples" or "10%" (of the run)',
            "examples": examples,
        }
        return {"anyOf": [{"type": "integer", "minimum": self.least, "maximum": 10**15}, text]}


Every = Annotated[Length, LengthOfRun(0)]
Lasting = Annotated[Length, LengthOfRun(1)]


@dataclass(frozen=True)
class SlurmUnit:
    """Reads a value by sbatch's rules, keeps it as a number, and writes it back as Slurm would show it."""

    parse: Callable[[object], int]
    show: Callable[[int], str]
    examples: tuple[str, str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shown = core_schema.plain_serializer_function_ser_schema(self.show, return_schema=core_schema.str_schema())
        return core_schema.no_info_before_validator_function(self.parse, handler(source), serialization=shown)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        words = " or ".join(f'"{example}"' for example in self.examples)
        return {"type": "string", "description": f"text such as {words}", "examples": list(self.examples)}


SlurmTime = Annotated[int, Field(gt=0, le=10**9), SlurmUnit(parse_slurm_time, format_slurm_time, ("1-12:00:00", "2h"))]
SlurmMemory = Annotated[int, Field(le=10**18), SlurmUnit(parse_slurm_memory, format_slurm_memory, ("64G", "64GiB"))]

Schedule = Literal["gpipe", "1f1b", "interleaved1f1b", "interleavedzerobubble", "zbvzerobubble", "dualpipev"]
Precision = Literal["fp64", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are errors, numbers are never guessed from text.

    Validators are built once, for the whole recipe, when the first one is read; a section that has defaults only is
    `{}` here rather than an instance, which would build a validator of its own at every start of the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class RopeScaling(Section):
    """Rotary frequencies for longer sequences than those that the model began with (transformers' `rope_type`).

    llama3: low frequencies are divided by `factor`. linear: all are. yarn: those that turn less than `beta_slow` times
    within `original_max_position` are, those that turn more than `beta_fast` times stay (Peng et al. 2023, arXiv
    2309.00071).
    """

    type: Literal["llama3", "linear", "yarn"] = Field("llama3", description="which frequencies are scaled, and how")
    factor: Annotated[float, Field(gt=0)] = Field(8.0, description="frequencies that are scaled are divided by it")
    low_freq_factor: Annotated[float, Field(gt=0)] = Field(
        1.0, description="llama3: wavelengths longer than original_max_position over this are scaled"
    )
    high_freq_factor: Annotated[float, Field(gt=0)] = Field(
        4.0, description="llama3: wavelengths shorter than original_max_position over this stay"
    )
    original_max_position: Small = Field(
        8192, description="llama3 and yarn: tokens of the sequences that the model began with"
    )
    beta_fast: Annotated[float, Field(gt=0)] = Field(
        32.0, description="yarn: what turns more often than this within original_max_position stays"
    )
    beta_slow: Annotated[float, Field(gt=0)] = Field(1.0, description="yarn: what turns less often is scaled whole")
    truncate: bool = Field(True, description="yarn: whole numbers of frequencies at both ends")
    attention_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="yarn: factor of cos and sin; default: from factor, mscale and mscale_all_dim"
    )
    mscale: Annotated[float, Field(gt=0)] | None = Field(None, description="yarn (DeepSeek)")
    mscale_all_dim: Annotated[float, Field(gt=0)] | None = Field(None, description="yarn (DeepSeek)")

    @model_validator(mode="after")
    def _has_what_its_type_reads(self) -> "RopeScaling":
        yarn = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
        llama3 = ("low_freq_factor", "high_freq_factor")
        unread = {"llama3": yarn, "yarn": llama3, "linear": (*llama3, *yarn, "original_max_position")}[self.type]
        fields = type(self).model_fields
        if other := [name for name in unread if getattr(self, name) != fields[name].default]:
            raise ValueError(f"{self.type} scaling has no {other[0]}")
        return self


class Experts(Section):
    """A mixture of experts in place of the MLP: a router chooses `top_k` of them for each token, and none is dropped.

    Experts have a gate and the activation of `model.activation`; the shared ones are one dense MLP beside them. What
    the loss depends on is counted over whole sequences, or the whole step, so that it does not depend on the topology.
    """

    experts: Small = Field(description="experts of a layer, of which the router chooses")
    top_k: Small = Field(description="experts that a token goes to")
    ffn_hidden_size: Small = Field(description="width of one expert between its matmuls")
    shared_ffn_hidden_size: Small | None = Field(
        None, description="width of the experts that every token goes to, together; default: there are none"
    )
    dense_layers: Annotated[int, Field(ge=0, le=10**6)] = Field(
        0, description="first layers that have an MLP of model.ffn_hidden_size and no experts (DeepSeek)"
    )
    router: Literal["softmax", "sigmoid"] = Field("softmax", description="what makes scores of the router's logits")
    normalize: bool = Field(True, description="scores of a token's experts are divided by their sum")
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="they are multiplied by it (DeepSeek)")
    groups: Small = Field(1, description="groups of experts, of which `top_groups` are chosen first (DeepSeek)")
    top_groups: Small = Field(1, description="those with the best sums of their two best scores")
    bias_rate: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="each expert has a bias of its scores, for the choice alone, moved by this a step against its "
        "load (DeepSeek-V3: 0.001); 0: it stays as loaded; default: there is none",
    )
    biases: bool = Field(False, description="biases on the router and on the experts' matmuls (gpt-oss)")
    aux_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="factor of the loss that balances each sequence's load (DeepSeek-V3, arXiv 2412.19437)"
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="factor of the loss that keeps the router's logits small (ST-MoE, arXiv 2202.08906)"
    )


class Latent(Section):
    """Multi-head latent attention: keys and values come from one short vector a token, and so may queries (DeepSeek-V2,
    arXiv 2405.04434)."""

    q_rank: Small | None = Field(None, description="width of what queries are made of; default: the residual stream")
    kv_rank: Small = Field(description="width of what keys and values are made of")
    nope_dim: Small = Field(description="channels of a head's query and key that are not turned")
    rope_dim: Small = Field(description="channels beside them that are; all heads share those of the key")
    value_dim: Small = Field(description="channels of a head's value")


Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "smollm3",
    "olmo2",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
]


class Model(Section):
    """A decoder-only transformer, in Hugging Face and Megatron terms."""

    preset: str | None = Field(
        None, description="sizes of a published model, a name of `tplaunch recipe list`; keys beside it change them"
    )
    hidden_size: Small = Field(description="width of the residual stream")
    num_layers: Small = Field(description="transformer blocks")
    num_heads: Small = Field(description="query heads of each block")
    num_kv_heads: Small | None = Field(None, description="key/value heads (GQA); default num_heads")
    head_dim: Small | None = Field(None, description="default hidden_size / num_heads")
    ffn_hidden_size: Small = Field(description="width of the MLP between its matmuls; with experts, of dense layers")
    vocab_size: Small = Field(description="tokens of the tokenizer, or more")
    make_vocab_size_divisible_by: Small = Field(128, description="the vocabulary is padded to a multiple of this")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="kind of the norms")
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="added to the mean square, or the variance, before its root"
    )
    norm_plus_one: bool = Field(False, description="norms multiply by 1 + weight (Gemma)")
    pre_norms: bool = Field(True, description="norms of what attention and MLP read; false: post_norms alone (OLMo 2)")
    post_norms: bool = Field(False, description="norms of what attention and MLP give, too (Gemma 2)")
    parallel_residual: bool = Field(
        False, description="the MLP reads what attention reads, not what it gives, too (GPT-NeoX)"
    )
    activation: Literal["swiglu", "geglu", "gelu", "gelu_exact", "swiglu_clamped"] = Field(
        "swiglu",
        description="of the MLP; swiglu and geglu have a gate beside its first matmul, and so has gpt-oss's "
        "swiglu_clamped; gelu and geglu are in tanh form",
    )
    moe: Experts | None = Field(None, description="experts in place of the MLP; null: none")
    latent: Latent | None = Field(None, description="multi-head latent attention (DeepSeek); null: plain")
    position: Literal["rope", "learned"] = Field("rope", description="rotary embeddings, or a learned table")
    max_position: Small | None = Field(None, description="rows of the learned position table")
    rope_theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(
        None, description="rotary frequencies for longer sequences; null: as they are"
    )
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of head_dim that is turned, its first channels (GPT-NeoX)"
    )
    rope_layers: Annotated[list[Literal["rope", "none"]], Field(min_length=1)] | None = Field(
        None, description="which layers turn queries and keys, repeated over them (SmolLM3); default: all"
    )
    window: Small | None = Field(None, description="tokens that a token attends to, itself included; default: all")
    window_layers: Annotated[list[Literal["window", "full"]], Field(min_length=1)] | None = Field(
        None, description="which layers have the window, repeated over them; default: all"
    )
    window_rope_theta: Annotated[float, Field(gt=0)] | None = Field(
        None, description="rope_theta of layers with a window, which then have no rope_scaling (Gemma 3)"
    )
    attention_softcap: Annotated[float, Field(gt=0)] | None = Field(
        None, description="c: scores are c tanh(score / c) (Gemma 2)"
    )
    logit_softcap: Annotated[float, Field(gt=0)] | None = Field(None, description="the same, of logits")
    attention_scale: Annotated[float, Field(gt=0)] | None = Field(
        None, description="factor of q k^T; default 1 / sqrt(head_dim)"
    )
    attention_sinks: bool = Field(
        False, description="each head has a score that takes part in its softmax and brings no value (gpt-oss)"
    )
    qkv_bias: bool = Field(False, description="biases on queries, keys and values (Qwen2)")
    linear_bias: bool = Field(False, description="biases on the attention output and on the MLP (GPT-2)")
    mlp_bias: bool | None = Field(None, description="biases on the MLP; default: as linear_bias (Llama)")
    qk_norm: bool = Field(False, description="RMSNorm over head_dim on queries and keys (Qwen3)")
    qk_norm_all_heads: bool = Field(False, description="that norm is over all heads together (OLMo 2)")
    tie_embeddings: bool = Field(False, description="the output layer is the embedding table")
    scale_embeddings: bool = Field(False, description="embeddings are multiplied by sqrt(hidden_size) (Gemma)")
    embedding_multiplier: Annotated[float, Field(gt=0)] = Field(
        1.0, description="embeddings are multiplied by it (Granite)"
    )
    residual_multiplier: Annotated[float, Field(gt=0)] = Field(
        1.0, description="what attention and MLP add is multiplied by it (Granite)"
    )
    logit_divisor: Annotated[float, Field(gt=0)] = Field(1.0, description="logits are divided by it (Granite)")
    family: Family | None = Field(
        None, description="model_type that `export` writes, of those that compute this model; default: the first"
    )
    init_std: Annotated[float, Field(gt=0, lt=10)] = Field(
        0.02,
        description="standard deviation of initial weights; those that end a block have it over sqrt(2 num_layers)",
    )

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        heads, hidden = values.get("num_heads"), values.get("hidden_size")
        if values.get("num_kv_heads") is None:
            values["num_kv_heads"] = heads
        known = type(heads) is int and type(hidden) is int
        latent = values.get("latent")
        if latent is not None and values.get("head_dim") is None:
            said = latent if isinstance(latent, dict) else dict(latent) if isinstance(latent, Latent) else {}
            nope, rope = said.get("nope_dim"), said.get("rope_dim")
            if type(nope) is int and type(rope) is int:
                values["head_dim"] = nope + rope
        elif values.get("head_dim") is None and known and 0 < heads <= hidden and hidden % heads == 0:
            values["head_dim"] = hidden // heads  # else it stays None, and `tplaunch.check.recipe` says why
        if values.get("mlp_bias") == values.get("linear_bias", False):
            values["mlp_bias"] = None  # one way to say it
        return values

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table; does not depend on tp, so that any topology loads any checkpoint."""
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation in ("swiglu", "geglu", "swiglu_clamped")

    @property
    def biased_mlp(self) -> bool:
        """Whether the MLP has biases; not where there is none, as all layers have experts."""
        if self.moe is not None and not self.moe.dense_layers:
            return False
        return self.linear_bias if self.mlp_bias is None else self.mlp_bias

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are turned, where positions are rotary."""
        assert self.head_dim is not None
        return self.latent.rope_dim if self.latent else int(self.head_dim * self.rotary_fraction)

    @property
    def value_dim(self) -> int:
        """Channels of a head's value."""
        assert self.head_dim is not None
        return self.latent.value_dim if self.latent else self.head_dim

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, by its global number, has experts in place of the MLP."""
        return self.moe is not None and layer >= self.moe.dense_layers

    def turns(self, layer: int) -> bool:
        """Whether a layer, by its global number, turns queries and keys, where positions are rotary."""
        kinds = self.rope_layers or ["rope"]
        return kinds[layer % len(kinds)] == "rope"

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer, by its global number, attends to; None: all before."""
        kinds = self.window_layers or ["window"]
        return self.window if kinds[layer % len(kinds)] == "window" else None


ContextKind = Literal["allgather", "ulysses"]


class Parallelism(Section):
    """TP x CP x PP x DP, and how each is done: the section `topology`."""

    tp: Small = Field(1, description="tensor parallel: GPUs that share each layer")
    pp: Small = Field(1, description="pipeline parallel: groups of consecutive layers")
    dp: Small | Literal["auto"] = Field("auto", description="data parallel replicas; auto fills the machine")
    cp: Small = Field(1, description="context parallel: GPUs that share each sequence")
    cp_kind: ContextKind = Field(
        "allgather", description="what they exchange: keys and values gathered, or heads for tokens"
    )
    ep: Small = Field(1, description="expert parallel: GPUs, of tp x cp x dp, that share the experts of each layer")
    expert_tp: Small = Field(1, description="tensor parallel of experts: GPUs, of the same, that share each expert")
    dp_replicate: Small = Field(1, description="HSDP: groups that hold full copies; dp / dp_replicate ranks shard")
    zero: int = Field(1, ge=0, le=3, description="ZeRO stage: 1 optimizer state, 2 gradients, 3 parameters")
    sequence_parallel: bool = Field(
        False, description="activations between layers are split along the sequence over tp (Korthikanti et al. 2022)"
    )
    async_tp: bool = Field(False, description="fuse matmuls with the collectives of sequence parallelism (CUDA)")
    schedule: Schedule = Field("1f1b", description="order of the pipeline's passes")
    virtual_stages: Small = Field(1, description="model chunks a pipeline rank (interleaved and V schedules)")
    stage_layers: list[Annotated[int, Field(ge=0, le=10**6)]] | None = Field(
        None, description="layers of each stage, in order; default: balanced by cost"
    )
    nodes: Small = Field(1, description="machines")
    gpus_per_node: Small | None = Field(None, description="default: world size / nodes")


Part = Literal[
    "norm", "qkv", "rotary", "core_attention", "attention_output", "dispatch", "gate_up", "activation", "down"
]


class Recompute(Section):
    """What blocks make again in the backward pass instead of keeping it: one of these. `tplaunch.spec.recompute` tells
    the parts."""

    every: Small | None = Field(None, description="whole blocks, every k-th of them")
    again: list[Part] | None = Field(None, description="these parts of every block")
    save: list[Part] | None = Field(None, description="all parts of every block but these")

    @model_validator(mode="after")
    def _is_said_one_way(self) -> "Recompute":
        said = [key for key in ("every", "again", "save") if getattr(self, key) is not None]
        if len(said) != 1:
            raise ValueError(f"of every, again and save one must be there, here are {' and '.join(said) or 'none'}")
        return self

    @model_serializer
    def _as_said(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


class BatchRampUp(Section):
    """Global batch size that grows linearly (Megatron `--rampup-batch-size`)."""

    start: BatchSize = Field(description="samples of the first steps")
    increment: BatchSize = Field(description="samples that are added at each size")
    steps: Small | None = Field(None, description="steps at each size")
    over: Lasting | None = Field(
        None, description="in place of steps: when the batch is full; each size has the same part of it"
    )


class BatchPiece(Section):
    """A global batch size for a part of the run, from where the one before ends."""

    size: BatchSize = Field(description="samples of each step")
    for_: Lasting | None = Field(None, alias="for", description="how long")
    until: Lasting | None = Field(None, description="in place of for: where in the run the next size begins")

    model_config = ConfigDict(populate_by_name=True)


Shape = Literal["warmup", "constant", "cosine", "linear", "exponential", "1-sqrt", "inverse-sqrt", "step"]


class Piece(Section):
    """What a rate does in a part of the run, from where the one before ends. A piece whose length is not said takes
    what the others leave.

    1-sqrt: Haegele et al. 2024, arXiv 2405.18392. inverse-sqrt falls as the root of how far the run is.
    """

    model_config = ConfigDict(populate_by_name=True)

    kind: Shape = Field(description="its shape; step: multiplied by `factor` at every `every`")
    for_: Lasting | None = Field(None, alias="for", description="how long; default: what the other pieces leave")
    until: Lasting | None = Field(None, description="in place of for: where in the run it ends")
    from_: Annotated[float, Field(ge=0)] | None = Field(
        None, alias="from", description="rate where it begins; default: where the one before ended, of a first warmup 0"
    )
    to: Annotated[float, Field(ge=0)] | None = Field(
        None, description="rate of its last step; default: of warmup the highest, else 0"
    )
    every: Lasting | None = Field(None, description="step: how long the rate stays")
    factor: Annotated[float, Field(gt=0)] | None = Field(None, description="step: what it is then multiplied by")

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


Pieces = Annotated[list[Piece], Field(min_length=1)]


class NonFinite(Section):
    """What to do when the loss or a gradient is not finite. Such a step's update is always skipped."""

    stop_after: Small = Field(25, description="such steps in a row that end the run with an error")
    rollback_after: Small | None = Field(
        None, description="after so many in a row, reload the last checkpoint and go on with new data"
    )


class LossSpike(Section):
    """A loss far above those before it brings back the last checkpoint's state; the data since then are skipped, with
    those of the spike (PaLM, Chowdhery et al. 2022, section 5.1)."""

    factor: Annotated[float, Field(gt=1)] = Field(1.5, description="a spike is more than so many times the median")
    window: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100, description="steps in the median; after a spike so many pass before another can be detected"
    )


class Ema(Section):
    """Exponential moving averages of the weights, in fp32, beside the weights that are trained: after an update
    average = decay * average + (1 - decay) * weight, from the weights after the first such update on."""

    model_config = ConfigDict(populate_by_name=True)

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="of the averages; about 1 / (1 - decay) updates weigh in"
    )
    every: Small = Field(1, description="steps between their updates")
    from_: Annotated[int, Field(ge=0)] = Field(0, alias="from", description="steps before they begin")


class Source(Section):
    """One corpus of a blend."""

    path: Text = Field(description="a file of text, a folder or pattern of them, or the prefix of a .bin/.idx pair")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="samples of this corpus, in relation to the others'")


Corpora = Text | Annotated[list[Text | Source], Field(min_length=1)]


class StageData(Section):
    """What a stage reads."""

    train: Corpora = Field(description="as data.train")


class StageCheckpoint(Section):
    """When a stage saves."""

    every: Every = Field(description="as checkpoint.every")


class Stage(Section):
    """A part of the run. It begins where the one before ends, and is as that one was, but for what it names."""

    name: Text | None = Field(None, description="what plans and charts call it")
    until: Lasting | None = Field(None, description="where in the run it ends; of the last stage: the run's end")
    last: Lasting | None = Field(None, description="in place of until: how long it is")
    data: StageData | None = Field(None, description="its mixture; each corpus goes on where it was left")
    seq_len: Annotated[int, Field(ge=1, le=2**24)] | None = Field(None, description="as training.seq_len")
    micro_batch_size: Small | None = Field(None, description="as training.micro_batch_size")
    global_batch_size: BatchSize | None = Field(
        None, description="as training.global_batch_size, in the place of its ramp and schedule from here on"
    )
    document_mask: bool | None = Field(None, description="as training.document_mask")
    rope_theta: Annotated[float, Field(gt=0)] | None = Field(None, description="as model.rope_theta")
    lr: Annotated[float, Field(ge=0)] | Piece | None = Field(
        None,
        description="the learning rate of this stage alone, in the place of lr_schedule: a constant, or a piece "
        "without a length, such as {kind: linear, to: 0}",
    )
    topology: Parallelism | None = Field(None, description="keys of topology that change")
    checkpoint: StageCheckpoint | None = Field(None, description="when it saves")

    def moved(self, paths: dict[str, str]) -> "Stage":
        """The same with other paths of text, each in the place of one."""
        data = self.data and StageData(train=_moved(self.data.train, paths))
        return self.model_copy(update={"data": data})

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said = {key: value for key, value in handler(self).items() if value is not None}
        if self.topology is not None:
            said["topology"] = self.topology.model_dump(include=self.topology.model_fields_set)
        return said


class Training(Section):
    """One run's length, batch, seed and numerics."""

    seq_len: Annotated[int, Field(ge=1, le=2**24)] = Field(description="tokens of a sample")
    micro_batch_size: Small = Field(1, description="samples of one pass through the model")
    global_batch_size: BatchSize = Field(description="samples of one step, over all replicas")
    batch_ramp_up: BatchRampUp | None = Field(None, description="a smaller global batch at first; null: none")
    batch_schedule: Annotated[list[BatchPiece], Field(min_length=1)] | None = Field(
        None, description="other global batch sizes, one after the other, before global_batch_size"
    )
    steps: Count = Field(
        0,
        description="optimizer updates of the whole run; default: as many as its tokens, or samples, take",
        json_schema_extra={"default": None},
    )
    tokens: Count | None = Field(
        None, description="length of the whole run, in place of steps: it ends with the step that reaches it"
    )
    samples: Count | None = Field(None, description="the same, in samples")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        1234, description="of initial weights and of the order of samples"
    )
    precision: Precision = Field("bf16", description="of the matmuls; weights are kept in fp32 (fp64: in fp64)")
    recompute: Literal["none", "cheap", "full", "auto"] | Recompute = Field(
        "none",
        description="what blocks make again in their backward passes; cheap: norm, rotary, activation; "
        "auto: what costs least of all that fits on the GPU",
    )
    compile: bool = Field(False, description="torch.compile of the parts of each block")
    grad_clip: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest 2-norm of all gradients together; null: no limit"
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of log(Z)^2 in the loss (PaLM)")
    eod_mask_loss: bool = Field(False, description="the first token after a document's end is not a target")
    document_mask: bool = Field(
        False, description="attention and positions restart at each document; of data.kind chat always"
    )
    nonfinite: NonFinite = Field(
        {}, validate_default=True, description="what is done where a loss or gradient is not finite"
    )
    loss_spike: LossSpike | None = Field(
        None, description="reload the last checkpoint after a loss spike; {} for the defaults"
    )
    loss_chunk: Small = Field(1024, description="tokens whose fp32 logits exist at one time")
    ema: Ema | None = Field(
        None, description="averaged weights, which validation measures, too, and `export --ema` takes; null: none"
    )
    eval_every: Every = Field(
        0,
        validate_default=True,
        description="steps between validations, and evaluations (eval.tasks); 0: never",
    )
    eval_steps: Small = Field(8, description="global batches of one validation")
    stages: Annotated[list[Stage], Field(min_length=1)] | None = Field(
        None, description="parts of the run with other data, lengths, batches, rates or topologies, one after the other"
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _stages_in_samples(cls, value: Any, info: ValidationInfo) -> Any:
        """Batches that stages say in tokens, in samples of their length."""
        length, found = info.data.get("seq_len"), []
        for stage in value if isinstance(value, list) else ():
            if isinstance(stage, dict):
                length = stage.get("seq_len") or length
                size = _in_samples(stage.get("global_batch_size"), length if isinstance(length, int) else None)
                stage = stage | ({} if size is None else {"global_batch_size": size})
            found.append(stage)
        return found if isinstance(value, list) else value

    @field_validator("global_batch_size", "batch_ramp_up", "batch_schedule", mode="before")
    @classmethod
    def _in_samples(cls, value: Any, info: ValidationInfo) -> Any:
        return _in_samples(value, info.data.get("seq_len"))

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps", 0) is None:
            return {key: value for key, value in values.items() if key != "steps"}
        return values

    @field_serializer("steps")
    def _said(self, steps: int) -> int | None:
        return steps or None

    @property
    def length(self) -> Length:
        """How long the run is, as it was said."""
        if self.tokens is not None:
            return Length(self.tokens, "tokens")
        return Length(self.steps) if self.samples is None else Length(self.samples, "samples")


def _in_samples(value: Any, seq_len: int | None) -> Any:
    """Batch sizes, wherever they stand in a value, in samples where they are said in tokens."""
    if isinstance(value, list):
        return [_in_samples(one, seq_len) for one in value]
    if isinstance(value, dict):
        sizes = ("size", "start", "increment")
        return {key: _in_samples(one, seq_len) if key in sizes else one for key, one in value.items()}
    if not (isinstance(value, str) and seq_len and value.strip().endswith("tokens")):
        return value
    tokens = int(parse_length(value).amount)
    if tokens % seq_len:
        near = " or ".join(f"{count * seq_len}" for count in (tokens // seq_len, tokens // seq_len + 1) if count)
        raise ValueError(f"{tokens:,} tokens are no whole number of samples of {seq_len:,}: {near} tokens are")
    return tokens // seq_len


class ParameterGroup(Section):
    """Parameters with a learning rate or a decay of their own."""

    match: Text = Field(
        description="a pattern of parameter names, such as layers.*.attention.w?.weight; of several groups that match "
        "a name, the first has it"
    )
    lr: Annotated[float, Field(ge=0)] | None = Field(
        None, description="their highest learning rate; over the run it moves in proportion to all others"
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="their decay, norms and biases not left out; default: as without the group"
    )


class Optimizer(Section):
    """AdamW (decoupled decay, on matrices only), plain SGD, or Muon: momentum orthogonalised by Newton-Schulz (Jordan
    2024), for the matrices of the blocks and of experts, with AdamW for embeddings, output, router, norms and biases.
    Muon's updates are as large as AdamW's, so that its lr and weight_decay fit (Moonlight, arXiv 2502.16982)."""

    name: Literal["adamw", "sgd", "muon"] = Field("adamw", description="kind")
    lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="highest learning rate")
    betas: Annotated[list[Probability], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95],
        description="decay of the running means of gradients and of their squares, of what AdamW updates",
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        1e-8, description="added to the root of the mean square, of what AdamW updates"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="decoupled, of matrices: not of norms and biases"
    )
    weight_decay_schedule: Pieces | None = Field(
        None, description="weight_decay over the run, in pieces; default: constant. Groups' own move in proportion"
    )
    momentum: Probability | None = Field(None, description="sgd and muon; default 0, of muon 0.95")
    state_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of AdamW's moments and Muon's momentum between steps; updates are computed in fp32, and in fp64 "
        "runs all is fp64 (bf16: DeepSeek-V3, arXiv 2412.19437)",
    )
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of gradients as they are added up over microbatches and summed over replicas; with ZeRO 2 and 3 "
        "of the sums over replicas alone",
    )
    groups: list[ParameterGroup] = Field([], description="parameters with a learning rate or a decay of their own")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("momentum") is None:
            values = {**values, "momentum": 0.95 if values.get("name") == "muon" else 0.0}
        return values


class LrSchedule(Section):
    """Linear warmup, then a decay to `min_lr`; or any pieces."""

    warmup_steps: Every = Field(0, validate_default=True, description="steps from 0 to lr")
    decay: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="from lr to min_lr; wsd: constant, then a decay at the end"
    )
    decay_steps: Lasting | None = Field(
        None, description="last steps of the run, over which lr decays; default: all after the warmup, of wsd a tenth"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate of the last step")
    pieces: Pieces | None = Field(
        None, description="in place of all these: the learning rate, piece after piece, from optimizer.lr"
    )


class ValidationText(Section):
    """One of several texts to validate on, with settings of its own."""

    path: Corpora = Field(
        description="as data.train: a file of text, a folder or pattern of them, the prefix of a .bin/.idx pair, or a "
        "list of these"
    )
    steps: Small | None = Field(None, description="its global batches of one validation; default training.eval_steps")


@dataclass(frozen=True)
class ValidationSet:
    """What is validated on together.

    Args:
        name: in metrics; "" where the recipe gives none.
        key: of the recipe, that says it.
        sources: its corpora.
        steps: its global batches of one validation; None: as the recipe says for all.
    """

    name: str
    key: str
    sources: list[Source]
    steps: int | None = None


class TrainTokenizer(Section):
    """Train a byte-level BPE on the training text."""

    vocab_size: Annotated[int, Field(ge=257, le=10**6)] = Field(description="tokens")


class Data(Section):
    """Corpora and tokenizer. Relative paths are relative to the recipe file that says them."""

    kind: Literal["text", "chat"] = Field(
        "text",
        description="chat: conversations, JSON lines of `messages` or of `prompt` and `completion`, packed whole into "
        "rows of training.seq_len; see finetune",
    )
    train: Corpora = Field(
        description="a file of text, a folder or pattern of them, the prefix of a .bin/.idx pair, or a list of these, "
        "each with its weight or 1"
    )
    validation: Corpora | Annotated[dict[str, Corpora | ValidationText], Field(min_length=1)] | None = Field(
        None,
        description="the same, of text that is not trained on; or several of them by name, each measured by itself: "
        "{wiki: PATH, code: {path: PATH, steps: 4}}",
    )
    packing: Literal["concatenate", "best_fit"] | None = Field(
        None,
        description="concatenate: documents follow one another, and samples are cut wherever they end; best_fit: rows "
        "are filled with whole documents, and only those longer than training.seq_len are cut (Ding et al. 2024, arXiv "
        "2404.10830); default: concatenate, of conversations best_fit",
    )
    tokenizer: Text | TrainTokenizer | None = Field(
        None, description="a tokenizer.json, or {vocab_size: N} to train one"
    )
    eod: Text | None = Field(
        None, description="the token that ends documents; default: what the tokenizer's folder says, else a known name"
    )
    text_key: str = Field("text", description="the field of a .jsonl line that holds the text, such as meta.text")
    document_length: Count | None = Field(
        None,
        description="tokens of a document, by which the FLOPs of training.document_mask are counted while the training "
        "data are not prepared; default 2048",
    )

    @property
    def packs(self) -> bool:
        """Whether rows are filled with whole documents."""
        return self.kind == "chat" or self.packing == "best_fit"

    def sources(self, split: Literal["train", "validation"]) -> list[Source]:
        """The corpora of a split, as a list of `Source`, empty when there are none."""
        return [source for _, source in self.keyed_sources(split)]

    def keyed_sources(self, split: Literal["train", "validation"]) -> list[tuple[str, Source]]:
        """The same, each with the dotted key that says its path."""
        return _keyed_sources(f"data.{split}", getattr(self, split))

    def validation_sets(self) -> list[ValidationSet]:
        """What is validated on, each by itself; empty when there is nothing."""
        if self.validation is None:
            return []
        named = self.validation if isinstance(self.validation, dict) else {"": self.validation}
        found = []
        for name, value in named.items():
            key = f"data.validation.{name}".rstrip(".")
            steps = value.steps if isinstance(value, ValidationText) else None
            found.append(ValidationSet(name, key, [source for _, source in _keyed_sources(key, value)], steps))
        return found


def _keyed_sources(key: str, value: Any) -> list[tuple[str, Source]]:
    """The corpora of a value of `Data`, with their dotted keys."""
    if isinstance(value, str):
        return [(key, Source(path=value))]
    if isinstance(value, list):
        every = [(f"{key}[{number}]", one) for number, one in enumerate(value)]
        return [(at, Source(path=one)) if isinstance(one, str) else (f"{at}.path", one) for at, one in every]
    if isinstance(value, ValidationText):
        return _keyed_sources(f"{key}.path", value.path)
    return [pair for name, one in (value or {}).items() for pair in _keyed_sources(f"{key}.{name}", one)]


def _moved(value: Any, paths: dict[str, str]) -> Any:
    """A value of `Data` with other paths, each in the place of one; one that has none stays."""
    if isinstance(value, str):
        return paths.get(value, value)
    if isinstance(value, list):
        return [_moved(one, paths) for one in value]
    if isinstance(value, (Source, ValidationText)):
        return value.model_copy(update={"path": _moved(value.path, paths)})
    return None if value is None else {name: _moved(one, paths) for name, one in value.items()}


def occurrences(sources: list[Source]) -> list[tuple[str, int]]:
    """The path of each corpus of a mixture, and how often it came before."""
    seen: dict[str, int] = {}
    found = []
    for path in (source.path for source in sources):
        found.append((path, seen.get(path, 0)))
        seen[path] = found[-1][1] + 1
    return found


def task_name(path: str) -> str:
    """What metrics call the task that reads a file: the file's name, without its ending."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", os.path.basename(path.rstrip("/")).split(".")[0])


class Task(Section):
    """A text, or questions with choices, that a model is measured by; as `tplaunch eval` takes them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = Field(
        None, description="as metrics call it, eval/NAME/loss; default: the file's, without its ending"
    )
    data: Text | None = Field(None, description="a file of text, a folder or pattern of them, or a .bin/.idx prefix")
    choices: Text | None = Field(None, description="JSON lines of question, choices and answer")
    text_key: str | None = Field(None, description="the field that holds the text; default: data.text_key")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "Task":
        if (self.data is None) == (self.choices is None):
            raise ValueError("of data and choices one must be there")
        return self

    @property
    def path(self) -> str:
        """What it reads."""
        path = self.data if self.choices is None else self.choices
        assert path is not None  # see `_is_one_of_both`
        return path

    @property
    def label(self) -> str:
        """What metrics call it."""
        return self.name or task_name(self.path)


class Eval(Section):
    """What the model is measured by while it is trained, every `training.eval_every` steps and at the end; the numbers
    are those of `tplaunch eval` at that step's checkpoint."""

    tasks: list[Task] = Field([], description="texts, and questions with choices")


class Checkpoint(Section):
    """When to save and what to keep. The last step is always saved."""

    model_config = ConfigDict(populate_by_name=True)

    every: Every = Field(0, validate_default=True, description="steps between saves; 0: only at the end")
    keep: Small = Field(3, description="newest checkpoints that stay")
    keep_every: Lasting | None = Field(None, description="steps whose multiples stay for ever")
    keep_best: Text | None = Field(
        None,
        description="a validation loss, such as validation/loss or validation/wiki/loss: of the checkpoints written "
        "after a step that was validated, the one with the smallest stays, besides",
    )
    export_every: Lasting | None = Field(
        None,
        description="steps whose multiples are also written as a Hugging Face folder, step-*.hf beside the checkpoint, "
        "with which it goes",
    )
    async_: bool = Field(True, alias="async", description="training goes on while files are written")
    initial: Text | None = Field(
        None,
        description="what a new run takes its weights from: a checkpoint, also as RUN@STEP, a run directory (its "
        "newest), or a Hugging Face folder; where data.tokenizer is not said, its tokenizer, too",
    )


Target = Literal["wq", "wk", "wv", "wo", "gate", "up", "down"]


class Lora(Section):
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685): a matrix W of [out, in] becomes
    W + alpha / rank B A, with A of [rank, in] and B of [out, rank], which alone are trained."""

    rank: Annotated[int, Field(ge=1, le=4096)] = Field(16, description="rows of A and columns of B")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="what B A is multiplied with, over rank")
    targets: Literal["all-linear"] | Annotated[list[Target], Field(min_length=1)] = Field(
        "all-linear",
        description="the matrices that get adapters, by the last part of their name: wq, wk, wv, wo of attention; "
        "gate, up, down of MLPs and of shared experts; all-linear: all of these. Experts, their router, embedding and "
        "output layer stay frozen",
    )


class Finetune(Section):
    """How a model that is trained already is trained on, and what of conversations (`data.kind: chat`)."""

    chat_template: Text | None = Field(
        None, description="a file of jinja that renders messages; default: the template of the tokenizer's folder"
    )
    loss_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="tokens that are targets: what the assistant says, up to the token that ends its turn, or all",
    )
    lora: Lora | None = Field(None, description="train low-rank adapters, and nothing else; {} for the defaults")


class Wandb(Section):
    """Weights & Biases. auto: online with a key, else offline."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, else offline"
    )
    project: str = Field("tplaunch", description="the W&B project")
    entity: str | None = Field(None, description="the W&B user or team; null: the account's own")
    group: str | None = Field(None, description="runs of one group stand together; default: of a sweep, its name")
    job_type: str = Field("train", description="what W&B lists the run as; members of a sweep are sweep, unless said")
    notes: str | None = Field(None, description="a longer text about the run")
    tags: list[str] = Field([], description="labels to filter by")
    system: Literal["main", "every_node"] = Field(
        "main", description="whose CPUs, memory, disks and GPUs are watched: rank 0's node, or all (online runs)"
    )


class Profile(Section):
    """A trace of some steps by torch's profiler, on a GPU with what its memory held, written to the run's profile/.
    SIGUSR2 asks a live run for another."""

    steps: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = Field(
        None, description="the first and the last; else none until a signal asks"
    )
    ranks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        [0], description="whose steps, also when a signal asks"
    )


class Samples(Section):
    """Texts that the model writes while it is trained, to the run's samples.jsonl: the likeliest continuations of some
    prompts."""

    every: Every = Field(0, validate_default=True, description="steps between them; 0: never")
    prompts: list[str] = Field([], description="beginnings of texts")
    max_tokens: Small = Field(64, description="tokens to add to each")


class Logging(Section):
    """What a run records of itself, and who reads it."""

    every: Lasting = Field(10, validate_default=True, description="steps between metric records")
    per_rank_every: Every = Field(
        0,
        validate_default=True,
        description="steps between records of each rank and of the gradients of each block; 0: never",
    )
    tensorboard: bool = Field(False, description="write the metric records for TensorBoard, too")
    on_event: Text | None = Field(
        None, description="a command, run without a shell for each event of the run, which it reads as JSON from stdin"
    )
    profile: Profile = Field({}, validate_default=True, description="traces by torch's profiler")
    samples: Samples = Field({}, validate_default=True, description="texts that the model writes while it is trained")
    wandb: Wandb = Field({}, validate_default=True, description="Weights & Biases")


class Container(Section):
    """A container for every Slurm task."""

    image: str = Field(description="name or file of the image")
    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="what starts it")
    mounts: list[str] = Field([], description="folders, as SOURCE:TARGET")


class Slurm(Section):
    """The job, in sbatch's own words."""

    partition: str | None = Field(None, description="sbatch --partition")
    account: str | None = Field(None, description="sbatch --account")
    qos: str | None = Field(None, description="sbatch --qos")
    reservation: str | None = Field(None, description="sbatch --reservation")
    constraint: str | None = Field(None, description="features that the nodes must have")
    nodelist: str | None = Field(None, description="nodes that must be among the job's")
    exclude: str | None = Field(None, description="nodes that must not be among the job's")
    time: SlurmTime | None = Field(None, description="limit of the job")
    mem: SlurmMemory | None = Field(None, description="of each node; 0: all of it")
    cpus_per_task: Small | None = Field(None, description="CPU cores of each node's task")
    gpus: bool = Field(True, description="ask for gpus_per_node GPUs on each node")
    gpu_type: str | None = Field(None, description="their type, as the cluster's gres names it: h100")
    exclusive: bool | Literal["user", "mcs"] = Field(False, description="share the nodes with no other job")
    licenses: str | None = Field(None, description="sbatch --licenses")
    switches: Small | str | None = Field(None, description="most leaf switches, and how long to wait: 1@2:00:00")
    dependency: str | None = Field(None, description="jobs to wait for: afterok:123")
    mail_type: str | None = Field(None, description="what to write a mail about: END,FAIL")
    mail_user: str | None = Field(None, description="who gets them")
    comment: str | None = Field(None, description="sbatch --comment")
    sbatch: list[str] = Field([], description="any other option of sbatch, whole: --wckey=x")
    requeue: bool = Field(
        True, description="the job goes back into the queue when it is preempted or ends at its limit"
    )
    grace: Seconds = Field(120.0, description="seconds before the limit at which the job is told to save")
    container: Container | None = Field(None, description="a container for every task")
    modules: list[str] = Field([], description="environment modules that are loaded first")
    setup: list[str] = Field([], description="shell lines run before the workers, e.g. activating a venv")
    env: dict[str, str] = Field({}, description="environment variables of the workers")


class Launch(Section):
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="times that a failed run is started again without a new checkpoint in between"
    )
    timeout: Seconds = Field(600.0, description="seconds a collective may take")
    first_step_timeout: Seconds = Field(1800.0, description="seconds that set-up and the first step may take")
    slurm: Slurm = Field({}, validate_default=True, description="the job, for `tplaunch submit`")


class Hardware(Section):
    """What to plan for. Detected when absent."""

    gpu: str | None = Field(
        None, description="a name of the table, such as h100-80gb, or a .json file that describes one"
    )
    imbalance: Annotated[float, Field(ge=1)] = Field(
        1.0, description="load of the rank whose experts get most tokens over the mean; 1: tokens go to all alike"
    )


class Recipe(Section):
    """One training run, whole."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="a name of letters, digits, dots, dashes and underscores",
    )
    model: Model = Field(description="the transformer")
    topology: Parallelism = Field({}, validate_default=True, description="TP x PP x DP")
    training: Training = Field(description="length, batch, numerics")
    optimizer: Optimizer = Field({}, validate_default=True, description="what updates the weights")
    lr_schedule: LrSchedule = Field({}, validate_default=True, description="learning rate over the run")
    data: Data = Field(description="corpora and tokenizer")
    finetune: Finetune = Field({}, validate_default=True, description="how a trained model is trained on")
    eval: Eval = Field({}, validate_default=True, description="what is measured beside the validation loss")
    checkpoint: Checkpoint = Field({}, validate_default=True, description="what is saved, and when")
    logging: Logging = Field({}, validate_default=True, description="what is recorded, and who reads it")
    launch: Launch = Field({}, validate_default=True, description="how processes are started")
    hardware: Hardware = Field({}, validate_default=True, description="the GPU to plan for")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        """Conversations that share a row do not see each other."""
        if isinstance(values, dict) and isinstance(data := values.get("data"), dict) and data.get("kind") == "chat":
            training = values.get("training")
            if isinstance(training, dict):
                values = {**values, "training": {"document_mask": True, **training}}
        return values

    def keyed_corpora(self) -> list[tuple[str, Source]]:
        """What is trained on in all stages, each corpus once, in the order of their first appearance, with the dotted
        key that says its path first. A path that one mixture has twice is two corpora."""
        stages = [stage.data and stage.data.train for stage in self.training.stages or ()]
        mixtures = [] if stages and stages[0] else [self.data.keyed_sources("train")]
        for number, corpora in enumerate(stages):
            mixtures.append(_keyed_sources(f"training.stages[{number}].data.train", corpora))
        if len(mixtures) == 1:
            return mixtures[0]
        said = {source.path: key for key, source in self.data.keyed_sources("train")}
        found: dict[tuple[str, int], tuple[str, Source]] = {}
        for mixture in mixtures:
            for name, (key, source) in zip(occurrences([source for _, source in mixture]), mixture, strict=True):
                found.setdefault(name, (said.get(source.path, key), source))
        return [*found.values()]

    @property
    def corpora(self) -> list[Source]:
        """What is trained on in all stages, each corpus once."""
        return [source for _, source in self.keyed_corpora()]

    def moved(self, paths: dict[str, str]) -> "Recipe":
        """The same with other paths of text, each in the place of one."""
        splits: tuple[Literal["train"], Literal["validation"]] = ("train", "validation")
        data = self.data.model_copy(update={split: _moved(getattr(self.data, split), paths) for split in splits})
        stages = self.training.stages and [stage.moved(paths) for stage in self.training.stages]
        return self.model_copy(update={"data": data, "training": self.training.model_copy(update={"stages": stages})})

    @property
    def lora(self) -> Lora | None:
        """The adapters that are trained in the place of the model; None: the model is."""
        return self.finetune.lora
