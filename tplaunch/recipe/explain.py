"""What pydantic refuses, in the user's words: place, key, value, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.tree import BROKEN, Tree

Path = tuple[str | int, ...]  # of a value in a recipe: keys and list indices

# Names that Hugging Face configs, Megatron options and other trainers use for a key here.
SYNONYMS = {
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "num_query_groups": "model.num_kv_heads",
    "kv_channels": "model.head_dim",
    "rms_norm_eps": "model.norm_eps",
    "hidden_act": "model.activation",
    "tie_word_embeddings": "model.tie_embeddings",
    "attention_bias": "model.qkv_bias",
    "max_position_embeddings": "model.max_position",
    "rotary_base": "model.rope_theta",
    "rotary_percent": "model.rotary_fraction",
    "rotary_pct": "model.rotary_fraction",
    "partial_rotary_factor": "model.rotary_fraction",
    "no_rope_layers": "model.rope_layers",
    "use_parallel_residual": "model.parallel_residual",
    "attention_multiplier": "model.attention_scale",
    "logits_scaling": "model.logit_divisor",
    "num_experts": "model.moe.experts",
    "num_local_experts": "model.moe.experts",
    "n_routed_experts": "model.moe.experts",
    "num_moe_experts": "model.moe.experts",
    "num_experts_per_tok": "model.moe.top_k",
    "moe_router_topk": "model.moe.top_k",
    "moe_intermediate_size": "model.moe.ffn_hidden_size",
    "moe_ffn_hidden_size": "model.moe.ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "model.moe.shared_ffn_hidden_size",
    "first_k_dense_replace": "model.moe.dense_layers",
    "scoring_func": "model.moe.router",
    "moe_router_score_function": "model.moe.router",
    "norm_topk_prob": "model.moe.normalize",
    "routed_scaling_factor": "model.moe.scale",
    "moe_router_topk_scaling_factor": "model.moe.scale",
    "n_group": "model.moe.groups",
    "moe_router_num_groups": "model.moe.groups",
    "topk_group": "model.moe.top_groups",
    "moe_router_group_topk": "model.moe.top_groups",
    "moe_router_bias_update_rate": "model.moe.bias_rate",
    "router_aux_loss_coef": "model.moe.aux_loss",
    "moe_aux_loss_coeff": "model.moe.aux_loss",
    "moe_z_loss_coeff": "model.moe.z_loss",
    "q_lora_rank": "model.latent.q_rank",
    "kv_lora_rank": "model.latent.kv_rank",
    "qk_nope_head_dim": "model.latent.nope_dim",
    "qk_rope_head_dim": "model.latent.rope_dim",
    "v_head_dim": "model.latent.value_dim",
    "expert_parallel": "topology.ep",
    "expert_model_parallel_size": "topology.ep",
    "expert_tensor_parallel_size": "topology.expert_tp",
    "tensor_parallel": "topology.tp",
    "tensor_model_parallel_size": "topology.tp",
    "context_parallel": "topology.cp",
    "context_parallel_size": "topology.cp",
    "pipeline_parallel": "topology.pp",
    "pipeline_model_parallel_size": "topology.pp",
    "data_parallel": "topology.dp",
    "data_parallel_size": "topology.dp",
    "num_nodes": "topology.nodes",
    "nproc_per_node": "topology.gpus_per_node",
    "seq_length": "training.seq_len",
    "sequence_length": "training.seq_len",
    "train_iters": "training.steps",
    "max_steps": "training.steps",
    "train_samples": "training.samples",
    "train_tokens": "training.tokens",
    "rampup_batch_size": "training.batch_ramp_up",
    "batch_size": "training.global_batch_size",
    "clip_grad": "training.grad_clip",
    "dtype": "training.precision",
    "learning_rate": "optimizer.lr",
    "save_interval": "checkpoint.every",
    "log_interval": "logging.every",
}


# Values of other trainers, or of before, and what they are here.
VALUES = {("training.recompute", "selective"): "write {again: [core_attention]}, or cheap, which saves more for less"}


def explain(error: ValidationError, tree: Tree) -> list[Problem]:
    """One problem for each value of `tree` that `error` is about."""
    schema = _recipe_schema()
    found: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_tree_path(detail, tree), []).append(detail)
    # Of a union every member complains; the one that got deepest is the one that was meant.
    meant = [path for path in found if not any(other[: len(path)] == path and other != path for other in found)]
    problems = [_problem(path, found[path], tree, schema) for path in meant]
    return [problem for problem in problems if problem is not None]


@cache
def _recipe_schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _problem(path: Path, details: list[ErrorDetails], tree: Tree, schema: dict[str, Any]) -> Problem | None:
    node, key, kinds = _node(path, tree), dotted(path), {detail["type"] for detail in details}
    allowed = _schema_at(path, schema)
    if node is None:
        section = _node(path[:-1], tree) or tree
        return Problem("is missing", fix=f"add it: {in_words(allowed, schema)}", where=section.key_origin, key=key)
    if node.value is BROKEN:
        return None
    if "extra_forbidden" in kinds:
        return Problem("no such key", fix=_nearest(path, schema), where=node.key_origin, key=key)
    value = node.plain()
    why = next((str(detail["ctx"]["error"]) for detail in details if detail["type"] == "value_error"), "")
    what = f"expected {in_words(allowed, schema)}, got {show_value(value)}"
    fix = VALUES.get((key, str(value))) or _hint(value, allowed, schema)
    return Problem(what, why=why, fix=fix, where=node.origin, key=key)


def dotted(path: Path) -> str:
    """("data", "train", 0, "path") -> "data.train[0].path"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show_value(value: Any, limit: int = 60) -> str:
    """A value as it would stand in YAML flow style, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=lambda broken: "?")
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _tree_path(detail: ErrorDetails, tree: Tree) -> Path:
    """Where pydantic's location leads in the tree; its names of union members lead nowhere and are left out."""
    path: list[str | int] = []
    node = tree
    for part in detail["loc"]:
        child = node.child(part)
        if child is not None:
            path.append(part)
            node = child
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


def _node(path: Path, tree: Tree) -> Tree | None:
    node: Tree | None = tree
    for part in path:
        node = node.child(part) if node is not None else None
    return node


def _hint(value: Any, field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What was probably meant."""
    members = list(_members(field, schema))
    kinds = {member.get("type") for member in members}
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"write {int(value)}"
    if not isinstance(value, str):
        return ""
    if "boolean" in kinds and value.lower() in ("yes", "no", "on", "off", "true", "false"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
    if kinds & {"integer", "number"} and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value, re.IGNORECASE):
        return "write the number without quotes"
    names = [str(name) for member in members for name in member.get("enum", [member.get("const", "")])]
    near = difflib.get_close_matches(value.lower(), names, n=1)
    return f"did you mean {near[0]}?" if near else ""


def editor_json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file: nothing but the items of lists must be whole, `extends` may give the rest."""
    schema = Recipe.model_json_schema()
    for section in (schema, *(schema["$defs"][name] for name in schema["$defs"] if name != "Source")):
        section.pop("required", None)
    extends = {"type": "string", "minLength": 1, "description": "a recipe that this one is merged over"}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _members(field: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The members of a union, or the field itself, with references followed."""
    if "$ref" in field:
        yield from _members(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    elif "anyOf" in field:
        for member in field["anyOf"]:
            yield from _members(member, schema)
    else:
        yield field


def _schema_at(path: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the value at a path; empty when the recipe has no such key."""
    field = schema
    for part in path:
        found = (_child(member, part) for member in _members(field, schema))
        field = next((child for child in found if child is not None), {})
    return field


def _child(field: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    if isinstance(part, int):
        return field.get("items")
    values = field.get("additionalProperties")  # False, or the schema of a free mapping's values
    return field.get("properties", {}).get(part) or (values if isinstance(values, dict) else None)


def in_words(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a field takes, in words."""
    said = dict.fromkeys(_word(member, schema) for member in _members(field, schema))
    return " or ".join(said)


def _word(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    kind = field.get("type")
    if kind in ("integer", "number"):
        return {"integer": "a whole number", "number": "a number"}[kind] + _range(field)
    if kind == "string":
        return field.get("description") or ("text that is not empty" if field.get("minLength") else "text")
    if kind == "array":
        count = field.get("minItems")
        exactly = f" of {count}" if count is not None and count == field.get("maxItems") else ""
        return f"a list{exactly}, each {in_words(field.get('items', {}), schema)}"
    if kind == "object":
        names = ", ".join(field.get("properties", {}))
        return f"a mapping ({names})" if names else "a mapping of names to text"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "a value")


def _range(field: dict[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f" from {low:,} to {high:,}"
    bounds = [("at least", low), ("above", field.get("exclusiveMinimum"))]
    bounds += [("at most", high), ("below", field.get("exclusiveMaximum"))]
    words = " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)
    return f" {words}" if words else ""


def _all_keys(schema: dict[str, Any]) -> list[str]:
    """Every dotted key of a recipe, sections too (list items excepted)."""

    def below(field: dict[str, Any], prefix: str) -> Iterator[str]:
        for member in _members(field, schema):
            for name, child in member.get("properties", {}).items():
                yield f"{prefix}{name}"
                yield from below(child, f"{prefix}{name}.")

    return list(below(schema, ""))


def _nearest(path: Path, schema: dict[str, Any]) -> str:
    """What to write in place of an unknown key."""
    name, section = str(path[-1]), dotted(path[:-1])
    here = [key for member in _members(_schema_at(path[:-1], schema), schema) for key in member.get("properties", {})]
    everywhere = _all_keys(schema)
    if name in everywhere and "." in name:
        return "nest it: write {2} inside of {0}".format(*name.rpartition("."))
    if name in SYNONYMS:
        return f"use {SYNONYMS[name]}"
    if same := sorted((key for key in everywhere if key.rpartition(".")[2] == name), key=lambda key: key.count(".")):
        return f"it belongs elsewhere: {' or '.join(same[:3])}"
    if near := difflib.get_close_matches(name.lower(), here, n=1):
        return f"did you mean {near[0]}?"
    # Then its subsections' keys, if very like it; a near name in another section is a word of another matter.
    inside = {key.rpartition(".")[2]: key for key in everywhere if key.count(".") == len(path)}
    inside = {last: key for last, key in inside.items() if key.startswith(f"{section}." if section else "")}
    if near := difflib.get_close_matches(name.lower(), inside, n=1, cutoff=0.8):
        return f"did you mean {inside[near[0]]}?"
    return f"the keys of {section or 'a recipe'} are {', '.join(here)}"
