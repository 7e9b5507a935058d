"""Rules of experts and of latent attention, each with its mend; and that following the mend helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.check.mends import follow_first_mends
from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.check.rules import can_run
from tplaunch.errors import Problem, RecipeError
from tplaunch.recipe.load import load_recipe

RECIPE = """\
name: checked
model:
  hidden_size: 64
  num_layers: 4
  num_heads: 8
  num_kv_heads: 4
  ffn_hidden_size: 96
  vocab_size: 512
  moe: {experts: 8, top_k: 2, ffn_hidden_size: 48, bias_rate: 0.001}
training: {seq_len: 64, global_batch_size: 16, steps: 20}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""
LATENT = "latent={q_rank: 24, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 8}"
ALL_HEADS = "model.num_kv_heads=null"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("to be or not to be")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def check(recipe: Path, *overrides: str) -> Checked:
    return check_recipe(load_recipe(recipe, overrides))


def problems(recipe: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        check(recipe, *overrides)
    return caught.value.problems


REFUSED = [
    # overrides, key, what, why or a part of it, mend
    (["model.moe.top_k=9"], "model.moe.top_k", "a token goes to 9 experts, and there are 8", "", "top_k: at most 8"),
    (["model.moe.groups=3"], "model.moe.groups", "8 experts are not divisible by groups = 3", "", "groups: 2 or 4"),
    (
        ["model.moe.groups=8", "model.moe.top_groups=4"],
        "model.moe.groups",
        "8 groups of one expert",
        "the sum of its two best",
        "groups: 4",
    ),
    (
        ["model.moe.groups=2", "model.moe.top_groups=3"],
        "model.moe.top_groups",
        "3 groups are chosen, and there are 2",
        "",
        "top_groups: at most 2",
    ),
    (
        ["model.moe.groups=4", "model.moe.top_k=5", "model.moe.top_groups=2"],
        "model.moe.top_groups",
        "2 groups of 2 experts hold fewer than top_k 5",
        "",
        "top_groups: at least 3, or top_k: at most 4",
    ),
    (
        ["model.moe.dense_layers=4"],
        "model.moe.dense_layers",
        "the first 4 of 4 layers are dense: none is left for experts",
        "",
        "dense_layers: at most 3, or moe: null",
    ),
    (["model.activation=gelu"], "model.activation", "experts have a gate, and gelu has none", "", "activation: swiglu"),
    (
        ["model.mlp_bias=true"],
        "model.mlp_bias",
        "gives the MLP of dense layers biases, and there are no dense layers",
        "",
        "moe.biases",
    ),
    (
        ["model.moe=null", "topology.ep=2", "topology.dp=2"],
        "topology.ep",
        "ep 2 shares experts, and the model has none",
        "",
        "ep: 1, or state model.moe",
    ),
    (
        ["model.moe=null", "topology.expert_tp=2", "topology.dp=2"],
        "topology.expert_tp",
        "expert_tp 2 shares experts, and the model has none",
        "",
        "expert_tp: 1, or state model.moe",
    ),
    (
        ["topology.ep=3", "topology.dp=3", "training.global_batch_size=18"],
        "topology.ep",
        "8 experts cannot be shared by ep = 3",
        "every ep rank holds the same number",
        "ep: 1",
    ),
    (
        ["topology.ep=6", "topology.dp=8"],
        "topology.ep",
        "8 experts cannot be shared by ep = 6",
        "every ep rank holds the same number",
        "ep: 4 or 8",
    ),
    (
        ["topology.expert_tp=5", "topology.dp=4"],
        "topology.expert_tp",
        "48 channels of an expert cannot be shared by expert_tp = 5",
        "",
        "expert_tp: 4",
    ),
    (
        ["topology.ep=8", "topology.tp=2", "topology.dp=2"],
        "topology.ep",
        "the 4 ranks of a stage (tp 2 x dp 2) are not divisible by ep 8",
        "experts are shared by ranks of one stage",
        "ep: 4",
    ),
    (
        ["topology.ep=4", "topology.expert_tp=2", "topology.tp=2", "topology.cp=2"],
        "topology.ep",
        "the 4 ranks of a stage (tp 2 x cp 2 x dp 1) are not divisible by ep 4 x expert_tp 2",
        "experts are shared by ranks of one stage",
        "ep: 2",
    ),
    (
        ["topology.ep=2", "topology.pp=4", "training.global_batch_size=16"],
        "topology.ep",
        "the 1 ranks of a stage (tp 1 x dp 1) are not divisible by ep 2",
        "experts are shared by ranks of one stage",
        "ep: 1",
    ),
    (
        ["topology.expert_tp=3", "topology.dp=4"],
        "topology.expert_tp",
        "the 4 ranks of a stage (tp 1 x dp 4) are not divisible by expert_tp 3",
        "experts are shared by ranks of one stage",
        "expert_tp: 2 or 4",
    ),
    (
        ["topology.ep=4", "topology.dp=8", "topology.dp_replicate=4"],
        "topology.dp_replicate",
        "2 ranks hold the same experts, which dp_replicate = 4 does not divide",
        "each of its groups holds a full copy, of experts too",
        "dp_replicate: 2, or ep: 2",
    ),
    (
        ["topology.tp=4", "training.seq_len=62"],
        "training.seq_len",
        "seq_len 62 is not divisible by tp 4 = 4",
        "each tp rank sends its own part of a sequence to the experts",
        "seq_len: 60 or 64",
    ),
    (
        ["topology.tp=4", "topology.cp=4", "topology.cp_kind=ulysses", "training.seq_len=56", "model.num_heads=16"],
        "training.seq_len",
        "seq_len 56 is not divisible by cp 4 x tp 4 = 16",
        "each tp rank sends its own part of a sequence to the experts",
        "seq_len: 48 or 64",
    ),
    (
        ["topology.tp=4", "model.moe.shared_ffn_hidden_size=50"],
        "model.moe.shared_ffn_hidden_size",
        "shared_ffn_hidden_size 50 is not divisible by tp = 4",
        "",
        "shared_ffn_hidden_size: 48 or 52",
    ),
    (
        [f"model.{LATENT}"],
        "model.num_kv_heads",
        "4 key/value heads, where latent attention makes those of all 8 heads",
        "",
        "num_kv_heads: 8, or leave it out",
    ),
    (
        [f"model.{LATENT}", ALL_HEADS, "model.head_dim=16"],
        "model.head_dim",
        "head_dim 16 is not nope_dim 8 + rope_dim 4",
        "",
        "head_dim: 12, or leave it out",
    ),
    (
        [f"model.{LATENT.replace('rope_dim: 4', 'rope_dim: 5')}", ALL_HEADS],
        "model.latent.rope_dim",
        "rope_dim 5 is odd",
        "rotary embeddings turn pairs",
        "rope_dim: 6",
    ),
    (
        [f"model.{LATENT}", ALL_HEADS, "model.position=learned", "model.max_position=64"],
        "model.latent",
        "turns rope_dim channels, but position is learned",
        "",
        "position: rope, or latent: null",
    ),
    *(
        (
            [f"model.{LATENT}", ALL_HEADS, f"model.{key}={value}"],
            f"model.{key}",
            "latent attention has none",
            "",
            f"leave {key} out, or latent: null",
        )
        for key, value in {
            "qk_norm": "true",
            "qkv_bias": "true",
            "rotary_fraction": "0.5",
            "window": "16",
            "attention_sinks": "true",
        }.items()
    ),
    (
        [f"model.{LATENT}", ALL_HEADS, "topology.cp=3", "topology.cp_kind=ulysses", "training.seq_len=60"],
        "topology.cp",
        "8 heads cannot be shared by cp = 3",
        "ulysses gives each cp rank some of the heads",
        "cp: 2 or 4",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "what", "why", "mend"), REFUSED)
def test_refused(recipe: Path, overrides: list[str], key: str, what: str, why: str, mend: str) -> None:
    (problem,) = problems(recipe, *overrides)
    assert (problem.key, problem.what) == (key, what)
    assert why in problem.why and bool(why) == bool(problem.why)
    assert mend in problem.fix
    assert problem.where


@pytest.mark.parametrize(
    "overrides",
    [
        ["topology.ep=8", "topology.dp=8"],
        ["topology.ep=4", "topology.expert_tp=2", "topology.tp=2", "topology.cp=2", "topology.dp=2"],
        ["topology.ep=2", "topology.tp=2", "topology.pp=2", "topology.expert_tp=1"],
        ["topology.ep=2", "topology.dp=4", "topology.dp_replicate=2"],
        ["topology.tp=8", "model.num_kv_heads=8", "model.ffn_hidden_size=97"],  # of no layer
        ["model.moe.groups=4", "model.moe.top_groups=2", "model.moe.dense_layers=1", "topology.tp=4"],
        [f"model.{LATENT}", ALL_HEADS, "topology.tp=8", "topology.ep=8"],
        ["model.moe.biases=true", "model.linear_bias=true"],  # gpt-oss: of attention's output alone
    ],
)
def test_accepted(recipe: Path, overrides: list[str]) -> None:
    assert check(recipe, *overrides).warnings == []


def test_the_mlp_of_dense_layers_is_shared_by_tp(recipe: Path) -> None:
    overrides = ["model.moe.dense_layers=1", "topology.tp=8", "model.num_kv_heads=8", "model.ffn_hidden_size=97"]
    assert [problem.key for problem in problems(recipe, *overrides)] == ["model.ffn_hidden_size"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.moe.top_k=1"], "model.moe.normalize"),
        (["model.moe.bias_rate=null"], "model.moe"),
        (["model.moe.bias_rate=0"], "model.moe"),
        (["model.moe=null", "hardware.imbalance=1.5"], "hardware.imbalance"),
        (["model.moe=null", "training.recompute={again: [norm, dispatch]}"], "training.recompute"),
        (["model.moe=null", "training.recompute={save: [dispatch]}"], "training.recompute"),
        (["topology.expert_tp=4", "topology.dp=8", "topology.nodes=4"], "topology.expert_tp"),
    ],
)
def test_warned_of(recipe: Path, overrides: list[str], key: str) -> None:
    (warning,) = check(recipe, *overrides).warnings
    assert warning.key == key
    assert warning.where


def test_the_warnings_end_where_they_say(recipe: Path) -> None:
    assert check(recipe, "model.moe.top_k=1", "model.moe.normalize=false").warnings == []
    assert check(recipe, "model.moe.bias_rate=null", "model.moe.aux_loss=0.001").warnings == []
    crossing = ["topology.dp=8", "topology.nodes=4"]
    assert check(recipe, *crossing, "topology.expert_tp=2").warnings == []


def test_what_a_checked_recipe_says_of_itself(recipe: Path) -> None:
    said = check(recipe, "topology.ep=4", "topology.dp=8").describe()
    assert said.startswith("tp 1 x pp 1 x dp 8 = 8 ranks, experts ep 4 x edp 2; ")
    assert re.search(r"; [\d.]+K parameters \([\d.]+K active\) in ", said), said
    assert "active" not in check(recipe, "model.moe=null").describe()


@settings(max_examples=60)
@given(
    ep=st.integers(1, 12),
    expert_tp=st.integers(1, 6),
    tp=st.sampled_from([1, 2, 4]),
    dp=st.integers(1, 8),
    replicate=st.sampled_from([1, 2, 4]),
    seq_len=st.integers(32, 64),
    experts=st.integers(2, 12),
)
def test_a_first_mend_that_names_a_value_is_accepted(
    ep: int,
    expert_tp: int,
    tp: int,
    dp: int,
    replicate: int,
    seq_len: int,
    experts: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Following "KEY: VALUE" of one problem makes that problem go away; and `tune` takes what the checks take."""
    assume(dp % replicate == 0)
    folder = tmp_path_factory.mktemp("mend")
    (folder / "r.yaml").write_text(RECIPE)
    overrides = [f"topology.{key}={value}" for key, value in (("tp", tp), ("dp", dp), ("ep", ep))]
    overrides += [f"topology.expert_tp={expert_tp}", f"topology.dp_replicate={replicate}"]
    overrides += [f"training.seq_len={seq_len}", f"training.global_batch_size={dp}", f"model.moe.experts={experts}"]
    assert follow_first_mends(folder / "r.yaml", overrides) != can_run(load_recipe(folder / "r.yaml", overrides).recipe)
