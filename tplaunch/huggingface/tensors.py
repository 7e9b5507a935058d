"""What each tensor of a model is called in Hugging Face's files, and how it is made of ours. Torch-free."""

from __future__ import annotations

from itertools import groupby
from math import prod
from typing import NamedTuple

from tplaunch.huggingface.config import GEMMA2, GEMMA3, GPT2, GPT_NEOX, OLMO2, PHI3, Family
from tplaunch.recipe.schema import Model
from tplaunch.spec.parameters import Parameter, parameter_shapes


class HfTensor(NamedTuple):
    """One tensor of the files.

    Args:
        name: there.
        parts: ours, that make it when stacked along their first dimension.
        rows: first rows of the stack that it has; ours may be padded.
        transposed: whether it is [in, out] (the Conv1D of GPT-2) instead of [out, in].
        heads: of each of its parts, which take turns in it, head by head (GPT-NeoX); 1: one part follows the other.
    """

    name: str
    parts: tuple[Parameter, ...]
    rows: int
    transposed: bool = False
    heads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.rows, *self.parts[0].shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def elements(self) -> int:
        return prod(self.shape)


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


_NAMES = {GEMMA2: _GEMMA, GEMMA3: _GEMMA, OLMO2: _OLMO2, PHI3: _PHI3, GPT_NEOX: _GPT_NEOX, GPT2: _GPT2}


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
        return f"{layers}.{parameter.layer}.{names[module.split('.', 2)[2]]}.{kind}"

    # Weights and biases of projections that a family fuses take turns: sorting by name (stable) joins them.
    shapes = parameter_shapes(model)
    order = {found: place for place, found in reversed([*enumerate(map(name, shapes))])}
    tensors = []
    for found, group in groupby(sorted(shapes, key=lambda p: order[name(p)]), key=name):
        parts = tuple(group)
        padded = parts[0].role in ("embedding", "output")
        rows = model.vocab_size if padded else sum(part.shape[0] for part in parts)
        turns = model.num_heads if family == GPT_NEOX and len(parts) > 1 else 1
        tensors.append(HfTensor(found, parts, rows, family == GPT2 and parts[0].role == "matrix", turns))
    return tensors
