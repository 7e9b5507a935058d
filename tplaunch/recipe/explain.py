"""What pydantic refuses, in the user's words: place, key, value, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.tree import BROKEN, Tree

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
    "tensor_parallel": "topology.tp",
    "tensor_model_parallel_size": "topology.tp",
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
    "batch_size": "training.global_batch_size",
    "clip_grad": "training.grad_clip",
    "dtype": "training.precision",
    "learning_rate": "optimizer.lr",
    "max_restart": "launch.max_restarts",
    "save_interval": "checkpoint.every",
    "log_interval": "logging.every",
}


def explain(error: ValidationError, tree: Tree) -> list[Problem]:
    """One problem for each value of `tree` that `error` is about, in the order of the schema."""
    schema = recipe_json_schema()
    by_key: dict[str, list[tuple[tuple[str | int, ...], dict[str, Any]]]] = {}
    for detail in error.errors(include_url=False):
        path = _tree_path(detail["loc"], tree, missing=detail["type"] == "missing")
        by_key.setdefault(dotted(path), []).append((path, dict(detail)))
    problems = []
    for key, found in by_key.items():
        # Of a union each member complains; the one that got deepest is the one that was meant.
        if any(other.startswith((f"{key}.", f"{key}[")) for other in by_key if other != key):
            continue
        path, detail = found[0]
        node = _node(path, tree)
        if node is not None and node.value is BROKEN:
            continue
        problems.append(_problem(key, path, node, [d for _, d in found], detail, schema, tree))
    return problems


def dotted(path: tuple[str | int, ...]) -> str:
    """("data", "train", 0, "path") -> "data.train[0].path"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show_value(value: Any, limit: int = 60) -> str:
    """A value as it would stand in YAML flow style, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _tree_path(loc: tuple[str | int, ...], tree: Tree, *, missing: bool) -> tuple[str | int, ...]:
    """The part of pydantic's location that names values: names of union members are left out."""
    path: list[str | int] = []
    node: Tree | None = tree
    for part in loc:
        child = node.child(part) if node is not None else None
        if child is not None:
            path.append(part)
            node = child
    return (*path, loc[-1]) if missing else tuple(path)


def _node(path: tuple[str | int, ...], tree: Tree) -> Tree | None:
    node: Tree | None = tree
    for part in path:
        node = node.child(part) if node is not None else None
    return node


def _problem(
    key: str,
    path: tuple[str | int, ...],
    node: Tree | None,
    details: list[dict[str, Any]],
    detail: dict[str, Any],
    schema: dict[str, Any],
    tree: Tree,
) -> Problem:
    field = _schema_at(path, schema)
    if node is None:
        parent = _node(path[:-1], tree) or tree
        return Problem("is missing", fix=f"add it: {_allowed(field, schema)}", where=parent.key_origin, key=key)
    if any(d["type"] == "extra_forbidden" for d in details):
        return Problem("is not a key here", fix=_nearest(path, schema), where=node.key_origin, key=key)
    reason = next((str(d["ctx"]["error"]) for d in details if d["type"] == "value_error"), "")
    allowed = f"must be {_allowed(field, schema)}"
    return Problem(f"{show_value(node.plain())} {allowed}", why=reason, where=node.origin, key=key)


def recipe_json_schema() -> dict[str, Any]:
    """The JSON Schema of a whole recipe."""
    return Recipe.model_json_schema()


def _resolve(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema with its reference followed."""
    return schema["$defs"][field["$ref"].rsplit("/", 1)[1]] if "$ref" in field else field


def _members(field: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The members of a union, or the field itself."""
    field = _resolve(field, schema)
    for member in field.get("anyOf", [field]):
        yield _resolve(member, schema)


def _schema_at(path: tuple[str | int, ...], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the value at a path; empty when the recipe has no such key."""
    field = schema
    for part in path:
        name = "items" if isinstance(part, int) else "properties"
        holder = next((m for m in _members(field, schema) if name in m), {})
        field = holder.get("items", {}) if name == "items" else holder.get("properties", {}).get(part, {})
    return field


def _allowed(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a field takes, in words."""
    said = dict.fromkeys(_allowed_one(member, schema) for member in _members(field, schema))
    return " or ".join(said)


def _allowed_one(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "enum" in field or "const" in field:
        return "one of " + ", ".join(map(str, field["enum"])) if "enum" in field else str(field["const"])
    kind = field.get("type")
    if kind in ("integer", "number"):
        return {"integer": "a whole number", "number": "a number"}[kind] + _range(field)
    if kind == "string":
        text = field.get("description") or "text"
        return f"{text} matching {field['pattern']}" if "pattern" in field else text
    if kind == "array":
        count = field.get("minItems")
        exactly = f" of {count}" if count is not None and count == field.get("maxItems") else ""
        return f"a list{exactly}, each {_allowed(field.get('items', {}), schema)}"
    if kind == "object":
        names = ", ".join(field.get("properties", {}))
        return f"a mapping ({names})" if names else "a mapping of names to text"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "a value")


def _range(field: dict[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    parts = [
        f"{word} {bound}"
        for word, bound in (("at least", low), ("at most", high), ("above", above), ("below", below))
        if bound is not None
    ]
    return (" " + " and ".join(parts)) if parts else ""


def all_keys(schema: dict[str, Any]) -> list[str]:
    """Every dotted key of a recipe, sections too (list items excepted)."""

    def below(field: dict[str, Any], prefix: str) -> Iterator[str]:
        for member in _members(field, schema):
            for name, child in member.get("properties", {}).items():
                yield f"{prefix}{name}"
                yield from below(child, f"{prefix}{name}.")

    return list(below(schema, ""))


def _nearest(path: tuple[str | int, ...], schema: dict[str, Any]) -> str:
    """What to write in place of an unknown key."""
    name = str(path[-1])
    holders = list(_members(_schema_at(path[:-1], schema), schema))
    here = [key for member in holders for key in member.get("properties", {})]
    everywhere = all_keys(schema)
    elsewhere = [key for key in everywhere if key.rsplit(".", 1)[-1] == name or key == name]
    if name in SYNONYMS:
        elsewhere.insert(0, SYNONYMS[name])
    section = dotted(path[:-1])
    if elsewhere:
        best = elsewhere[0]
        if best.rsplit(".", 1)[0] == section:
            return f"write {best.rsplit('.', 1)[1]}"
        return f"{name} belongs elsewhere: {' or '.join(elsewhere[:3])}" if name not in SYNONYMS else f"use {best}"
    close = difflib.get_close_matches(name, here, n=1)
    if close:
        return f"did you mean {close[0]}?"
    by_last = {key.rsplit(".", 1)[-1]: key for key in reversed(everywhere)}
    close = difflib.get_close_matches(name, by_last, n=1, cutoff=0.8)
    if close:
        return f"did you mean {by_last[close[0]]}?"
    return f"the keys of {section or 'a recipe'} are {', '.join(here)}"
