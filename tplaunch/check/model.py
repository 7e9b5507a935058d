"""Whether the fields of a model go together."""

from __future__ import annotations

from collections.abc import Iterator

from tplaunch.check.choices import choices, divisors, multiples
from tplaunch.check.experts import mixture_problems
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Latent, Model


def model_problems(model: Model, seq_len: int) -> Iterator[Problem]:
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    if heads % kv_heads:
        yield Problem(
            f"{heads} heads cannot share {kv_heads} key/value heads evenly",
            fix=f"num_kv_heads: {choices(divisors(heads), kv_heads)}",
            key="model.num_kv_heads",
        )
    if model.latent is not None:
        yield from _latent(model, model.latent)
    elif model.head_dim is None:
        yield Problem(
            f"hidden_size {model.hidden_size} is not a multiple of num_heads {heads}, so head_dim is unknown",
            fix=f"hidden_size: {choices(multiples(heads, model.hidden_size), model.hidden_size)}, or state head_dim",
            key="model.num_heads",
        )
    elif model.position == "rope" and model.head_dim % 2:
        yield Problem(
            f"head_dim {model.head_dim} is odd",
            why="rotary embeddings turn pairs of channels",
            fix=f"head_dim: {model.head_dim + 1}",
            key="model.head_dim",
        )
    elif model.position == "rope" and (model.rotary_dim % 2 or not model.rotary_dim):
        yield Problem(
            f"rotary_fraction {model.rotary_fraction:g} of head_dim {model.head_dim} are {model.rotary_dim} channels",
            why="rotary embeddings turn pairs of channels",
            fix=f"rotary_fraction: {(model.rotary_dim + 2) // 2 * 2 / model.head_dim:g}",
            key="model.rotary_fraction",
        )
    yield from mixture_problems(model)
    yield from _windows(model)
    yield from _block(model)
    if model.position == "learned":
        if model.max_position is None:
            yield Problem(
                "learned positions need a table size", fix=f"max_position: {seq_len}", key="model.max_position"
            )
        elif model.max_position < seq_len:
            yield Problem(
                f"the table has {model.max_position} positions, seq_len is {seq_len}",
                fix=f"max_position: {seq_len}, or training.seq_len: {model.max_position}",
                key="model.max_position",
            )
        if model.rope_scaling is not None:
            yield Problem(
                "scales rotary embeddings, but position is learned",
                fix="rope_scaling: null, or position: rope",
                key="model.rope_scaling",
            )
    elif (scaling := model.rope_scaling) and scaling.type == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        yield Problem(
            f"beta_slow {scaling.beta_slow:g} must be below beta_fast {scaling.beta_fast:g}",
            fix="the published values are 1 and 32",
            key="model.rope_scaling",
        )
    elif (scaling := model.rope_scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Problem(
            f"low_freq_factor {scaling.low_freq_factor:g} must be below high_freq_factor {scaling.high_freq_factor:g}",
            fix="the published values are 1.0 and 4.0",
            key="model.rope_scaling",
        )


def _latent(model: Model, latent: Latent) -> Iterator[Problem]:
    """What goes with latent attention, whose keys and values come from one vector of all heads."""
    if model.num_kv_heads != model.num_heads:
        yield Problem(
            f"{model.num_kv_heads} key/value heads, where latent attention makes those of all {model.num_heads} heads",
            fix=f"num_kv_heads: {model.num_heads}, or leave it out",
            key="model.num_kv_heads",
        )
    width = latent.nope_dim + latent.rope_dim
    if model.head_dim != width:
        yield Problem(
            f"head_dim {model.head_dim} is not nope_dim {latent.nope_dim} + rope_dim {latent.rope_dim}",
            fix=f"head_dim: {width}, or leave it out",
            key="model.head_dim",
        )
    if latent.rope_dim % 2:
        yield Problem(
            f"rope_dim {latent.rope_dim} is odd",
            why="rotary embeddings turn pairs of channels",
            fix=f"rope_dim: {latent.rope_dim + 1}",
            key="model.latent.rope_dim",
        )
    if model.position != "rope":
        what = "turns rope_dim channels, but position is learned"
        yield Problem(what, fix="position: rope, or latent: null", key="model.latent")
    for key, plain in (
        ("qk_norm", False),
        ("qkv_bias", False),
        ("rotary_fraction", 1.0),
        ("window", None),
        ("attention_sinks", False),
    ):
        if getattr(model, key) != plain:
            what, fix = "latent attention has none", f"leave {key} out, or latent: null"
            yield Problem(what, fix=fix, key=f"model.{key}")


def _windows(model: Model) -> Iterator[Problem]:
    for key in ("window_layers", "window_rope_theta"):
        if getattr(model, key) is not None and model.window is None:
            fix = f"window: how many tokens a token attends to, or {key}: null"
            yield Problem(
                f"{key} says what layers with a window do, and there is no window", fix=fix, key=f"model.{key}"
            )
    if model.window_rope_theta is not None and model.position != "rope":
        what, fix = "turns rotary embeddings, but position is learned", "window_rope_theta: null, or position: rope"
        yield Problem(what, fix=fix, key="model.window_rope_theta")
    for key, default in (("rope_layers", None), ("rotary_fraction", 1.0)):
        if getattr(model, key) != default and model.position != "rope":
            what, fix = "turns rotary embeddings, but position is learned", f"leave {key} out, or position: rope"
            yield Problem(what, fix=fix, key=f"model.{key}")
    if model.norm_plus_one and model.norm != "rmsnorm":
        yield Problem("only RMSNorm multiplies by 1 + weight", fix="norm: rmsnorm", key="model.norm_plus_one")


def _block(model: Model) -> Iterator[Problem]:
    """How a block's norms and sums go together."""
    if not model.pre_norms and not model.post_norms:
        what = "blocks without norms of what they read need those of what they give"
        yield Problem(what, fix="post_norms: true, or pre_norms: true", key="model.pre_norms")
    if model.parallel_residual and (model.post_norms or not model.pre_norms):
        what = "attention and MLP side by side have norms of what they read alone"
        yield Problem(what, fix="parallel_residual: false, or post_norms: false", key="model.parallel_residual")
    if model.qk_norm_all_heads and not model.qk_norm:
        what = "qk_norm_all_heads says what norms of queries and keys are over, and there are none"
        yield Problem(what, fix="qk_norm: true, or qk_norm_all_heads: false", key="model.qk_norm_all_heads")
