"""What each tensor of a model is called in Hugging Face's files, and how it is made of ours. Torch-free."""

from __future__ import annotations

from enum import Enum
from itertools import groupby
from math import prod
from typing import NamedTuple

from tplaunch.huggingface.families import (
    DEEPSEEK_V3,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    GPT_OSS,
    MIXTRAL,
    OLMO2,
    PHI3,
    QWEN3_MOE,
    Family,
)
from tplaunch.recipe.schema import Experts, Model
from tplaunch.spec.parameters import Parameter, parameter_shapes


class Way(Enum):
    """How one tensor of the files is made of ours."""

    ROWS = "parts follow each other; rows that pad ours are left out"
    COLUMNS = "the same as [in, out] instead of [out, in] (the Conv1D of GPT-2)"
    TURNS = "parts take turns, head by head (GPT-NeoX)"
    EXPERT = "one expert's rows of a part"
    EXPERT_TRANSPOSED = "the same as [out, in], where ours are [in, out]"
    EXPERTS_TRANSPOSED = "a part's experts, each transposed (gpt-oss)"
    EXPERTS_IN_TURN = "the parts' columns take turns, in each expert (gpt-oss)"


class HfTensor(NamedTuple):
    """One tensor of the files.

    Args:
        name: there.
        parts: ours, that it is made of.
        shape: there.
        way: how it is made of them.
        pieces: heads or experts that each part has.
        number: of those the expert's.
        wide: it is never narrower than fp32, whatever the others are.
    """

    name: str
    parts: tuple[Parameter, ...]
    shape: tuple[int, ...]
    way: Way
    pieces: int = 1
    number: int = 0
    wide: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def bytes(self, itemsize: int) -> int:
        """What it takes, of a model with numbers of so many bytes."""
        return self.elements * (max(itemsize, 4) if self.wide else itemsize)


_LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention": "self_attn",  # which has the sinks
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GEMMA = {
    **_LLAMA,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_OLMO2 = {
    **{name: theirs for name, theirs in _LLAMA.items() if name not in ("attention_norm", "mlp_norm")},
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    **_LLAMA,
    **{f"attention.w{name}": "self_attn.qkv_proj" for name in "qkv"},
    **{f"mlp.{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
}
_GPT_NEOX = {
    "embedding": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention.w{name}": "attention.query_key_value" for name in "qkv"},
    "attention.wo": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_GPT2 = {
    "embedding": "transformer.wte",
    "position": "transformer.wpe",
    "norm": "transformer.ln_f",
    "output": "lm_head",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.wq": "attn.c_attn",
    "attention.wk": "attn.c_attn",
    "attention.wv": "attn.c_attn",
    "attention.wo": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


# {} stands for an expert's number: it has a tensor of its own.
_MIXTRAL = {
    **_LLAMA,
    "moe.router": "block_sparse_moe.gate",
    "moe.experts.gate": "block_sparse_moe.experts.{}.w1",
    "moe.experts.down": "block_sparse_moe.experts.{}.w2",
    "moe.experts.up": "block_sparse_moe.experts.{}.w3",
}
_QWEN3_MOE = {
    **_LLAMA,
    "moe.router": "mlp.gate",
    **{f"moe.experts.{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}
_DEEPSEEK_V3 = {
    **_QWEN3_MOE,
    "moe.router.correction": "mlp.gate.e_score_correction_bias",
    **{f"moe.shared.{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
}
_GPT_OSS = {
    **_LLAMA,
    "moe.router": "mlp.router",
    **{f"moe.experts.{name}.weight": "mlp.experts.gate_up_proj" for name in ("gate", "up")},
    **{f"moe.experts.{name}.bias": "mlp.experts.gate_up_proj_bias" for name in ("gate", "up")},
    "moe.experts.down.weight": "mlp.experts.down_proj",
    "moe.experts.down.bias": "mlp.experts.down_proj_bias",
}

_NAMES = {GEMMA2: _GEMMA, GEMMA3: _GEMMA, OLMO2: _OLMO2, PHI3: _PHI3, GPT_NEOX: _GPT_NEOX, GPT2: _GPT2} | {
    MIXTRAL: _MIXTRAL,
    QWEN3_MOE: _QWEN3_MOE,
    DEEPSEEK_V3: _DEEPSEEK_V3,
    GPT_OSS: _GPT_OSS,
}


def embedding_name(family: Family) -> str:
    """What the embedding is called."""
    return f"{_NAMES.get(family, _LLAMA)['embedding']}.weight"


def output_name(family: Family) -> str:
    """What the output matrix is called, where it is not tied."""
    return f"{_NAMES.get(family, _LLAMA)['output']}.weight"


def hf_tensors(model: Model, family: Family) -> list[HfTensor]:
    """Every tensor of a model's files, in the order of the forward pass; a tied output matrix is none."""
    layers = {GPT2: "transformer.h", GPT_NEOX: "gpt_neox.layers"}.get(family, "model.layers")
    names = _NAMES.get(family, _LLAMA)

    def name(parameter: Parameter) -> str:
        module, _, kind = parameter.name.rpartition(".")
        if parameter.layer is None:
            return f"{names[module]}.{kind}"
        module = module.split(".", 2)[2]
        return f"{layers}.{parameter.layer}.{names.get(f'{module}.{kind}') or f'{names[module]}.{kind}'}"

    # Weights and biases of projections that a family fuses take turns: sorting by name (stable) joins them.
    shapes = parameter_shapes(model)
    order = {found: place for place, found in reversed([*enumerate(map(name, shapes))])}
    tensors = []
    for found, group in groupby(sorted(shapes, key=lambda p: order[name(p)]), key=name):
        tensors += _made_of(found, tuple(group), model, family)
    return tensors


def _made_of(name: str, parts: tuple[Parameter, ...], model: Model, family: Family) -> list[HfTensor]:
    """The tensors that are made of some parts: one, or one for each expert."""
    first, *others = parts
    if first.role in ("embedding", "output"):
        return [HfTensor(name, parts, (model.vocab_size, *first.shape[1:]), Way.ROWS)]
    if first.expert and model.moe is not None:
        return _made_of_experts(name, parts, model.moe, model.hidden_size)
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    if family == GPT2 and first.role == "matrix":
        return [HfTensor(name, parts, shape[::-1], Way.COLUMNS)]
    if family == GPT_NEOX and others:
        return [HfTensor(name, parts, shape, Way.TURNS, model.num_heads)]
    # transformers keeps them so, and writes them so.
    wide = first.role == "buffer" or (family == DEEPSEEK_V3 and first.role == "router")
    return [HfTensor(name, parts, shape, Way.ROWS, wide=wide)]


def _made_of_experts(name: str, parts: tuple[Parameter, ...], moe: Experts, hidden: int) -> list[HfTensor]:
    experts, ffn, weight = moe.experts, moe.ffn_hidden_size, parts[0].role == "expert"
    shape: tuple[int, ...]
    if "{}" in name:
        down = parts[0].name.endswith("down.weight")
        way, shape = (Way.EXPERT, (hidden, ffn)) if down else (Way.EXPERT_TRANSPOSED, (ffn, hidden))
        return [HfTensor(name.format(number), parts, shape, way, experts, number) for number in range(experts)]
    if len(parts) > 1:
        shape = (experts, hidden, 2 * ffn) if weight else (experts, 2 * ffn)
        return [HfTensor(name, parts, shape, Way.EXPERTS_IN_TURN, experts)]
    if weight:
        return [HfTensor(name, parts, (experts, ffn, hidden), Way.EXPERTS_TRANSPOSED, experts)]
    return [HfTensor(name, parts, parts[0].shape, Way.ROWS)]
