"""Adapters that cannot be trained are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check.test_check import check, problems, recipe  # noqa: F401 (a fixture)
from tplaunch.check.recipe import check_recipe
from tplaunch.recipe.load import load_recipe

LATENT = "model.latent={kv_rank: 16, nope_dim: 4, rope_dim: 4, value_dim: 8}"
MOE = "model.moe={experts: 4, top_k: 2, ffn_hidden_size: 32}"
REFUSED = [
    (["finetune.lora={}"], "finetune.lora", "need a trained model beneath them", "checkpoint.initial"),
    (["finetune.lora={}", "optimizer.name=muon"], "optimizer.name", "muon cannot train adapters", "adamw"),
    (["finetune.lora={}", "checkpoint.export_every=5"], "checkpoint.export_every", "exports none", "tplaunch export"),
    (
        ["finetune.lora={}", LATENT, "model.num_kv_heads=8", "model.head_dim=8"],
        "finetune.lora.targets",
        "wq, wk, wv cannot have adapters in a model with latent attention",
        "[wo, gate, up, down]",
    ),
    (["finetune.lora={targets: [up]}", MOE], "finetune.lora.targets", "no matrix that can have an adapter", "leave up"),
    (
        ["finetune.lora={targets: [wq, gate]}", "model.activation=gelu"],
        "finetune.lora.targets",
        "is called gate",
        "leave gate out",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "what", "mend"), REFUSED)
def test_refused(recipe: Path, overrides: list[str], key: str, what: str, mend: str) -> None:  # noqa: F811
    found = [problem for problem in problems(recipe, *overrides) if problem.key == key]
    assert any(what in problem.what and mend in problem.fix for problem in found), found


def test_a_plan_needs_no_model_beneath_and_counts_what_is_trained(recipe: Path) -> None:  # noqa: F811
    checked = check(recipe, "finetune.lora={rank: 2}", need_data=False)
    assert any(problem.key == "finetune.lora" for problem in checked.warnings)
    assert "with 16.38K in adapters of rank 2" in checked.describe()


def test_groups_are_of_adapters(recipe: Path) -> None:  # noqa: F811
    groups = "optimizer.groups=[{match: '*.lora_b', lr: 1.0e-2}]"
    check_recipe(load_recipe(recipe, ["finetune.lora={}", groups]), need_data=False)
    found = problems(recipe, "finetune.lora={}", "optimizer.groups=[{match: '*.wq.weight', lr: 1.0e-2}]")
    assert any(problem.key == "optimizer.groups[0].match" for problem in found)
