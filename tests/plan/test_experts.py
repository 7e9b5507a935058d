"""What is planned of mixtures of experts: FLOPs, weights by their own ranks, exchanges by link; and what the trainer
does."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tplaunch.check.recipe import check_recipe
from tplaunch.cli.main import run
from tplaunch.cli.views.table import plain
from tplaunch.plan.activations import block_activations
from tplaunch.plan.case import Case
from tplaunch.plan.change import Change
from tplaunch.plan.communication import axis_group
from tplaunch.plan.estimate import block_work, estimate
from tplaunch.plan.experts import bytes_by_link, grouped_efficiency, grouped_linear
from tplaunch.plan.tune import expert_cuts, tune
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model, Recipe
from tplaunch.spec import experts as spec
from tplaunch.spec.flops import model_flops_per_token, repeated_flops_per_token
from tplaunch.spec.gpu import GPUS, find_gpu
from tplaunch.spec.parameters import active_parameter_count, parameter_count
from tplaunch.spec.recompute import ALL
from tplaunch.spec.resolve import resolve
from tplaunch.spec.stages import balanced_layers

if TYPE_CHECKING:
    from tests.world import World

MIXTURE = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_hidden_size": 704,
    "vocab_size": 2048,
    "moe": {"experts": 8, "top_k": 2, "ffn_hidden_size": 512},
}


def case(name: str, *overrides: str) -> Case:
    checked = check_recipe(load_recipe(name, overrides), need_data=False)
    return Case(checked.recipe, find_gpu(checked.recipe.hardware.gpu or "h100-80gb"))


def small(model: dict[str, Any] | None = None, **topology: Any) -> Case:
    recipe = {
        "name": "test",
        "model": {**MIXTURE, **(model or {})},
        "topology": {"dp": 1, **topology},
        "training": {"seq_len": 1024, "global_batch_size": 16, "steps": 1},
        "data": {"train": "x"},
    }
    return Case(resolve(Recipe.model_validate(recipe)), GPUS["h100-80gb"])


# FLOPs


def test_a_token_pays_for_the_experts_that_it_goes_to() -> None:
    """Mixtral 8x7B by hand: attention, two experts of three matrices, the router, the output layer; 12.9B active
    (Jiang et al. 2024, arXiv 2401.04088), with the embedding, which multiplies nothing."""
    model = Model.model_validate(PRESETS["mixtral-8x7b"])
    block = 4096 * (4096 + 1024 + 1024 + 4096) + 2 * 3 * 4096 * 14336 + 4096 * 8
    expected = 6 * (32 * block + 32000 * 4096) + 12 * 32 * 32 * 128 * 4096
    assert model_flops_per_token(model, 4096) == expected
    assert active_parameter_count(model) == pytest.approx(12.9e9, rel=0.003)
    assert parameter_count(model) == pytest.approx(46.7e9, rel=0.001)
    # In a block that is made again whole: all but what the down projections of both experts take.
    again = repeated_flops_per_token(model, 4096, ALL, 0)
    assert again == 2 * (block - 2 * 4096 * 14336 - 4096 * 8) + 4 * 32 * 128 * 4096


def test_latent_attention_multiplies_values_that_are_narrower_than_keys() -> None:
    model = Model.model_validate(PRESETS["deepseek-v3"])
    more = model_flops_per_token(model, 4096) - model_flops_per_token(model, 0)
    assert more == 3 * 61 * 2 * 128 * (192 + 128) * 4096
    # 37B of 671B (arXiv 2412.19437), with the embedding.
    assert active_parameter_count(model) == pytest.approx(37.5e9, rel=0.01)
    narrow, wide = 7168 * (1536 + 512 + 64), 1536 * 128 * 192 + 512 * 128 * 256
    assert repeated_flops_per_token(model, 0, frozenset({"qkv"}), 5) == 2 * narrow  # the rest stays as it is turned
    assert repeated_flops_per_token(model, 0, frozenset({"norm", "qkv", "rotary"}), 5) == 2 * (narrow + wide)


def test_layers_that_cost_more_are_fewer_in_a_stage() -> None:
    wide = {"ffn_hidden_size": 8192, "num_layers": 16, "moe": {**MIXTURE["moe"], "dense_layers": 2}}
    narrow = {**wide, "ffn_hidden_size": 128}
    counts = [balanced_layers(small(model, pp=4).recipe) for model in (wide, narrow)]
    assert [sum(split) for split in counts] == [16, 16]
    assert counts[0][0] < counts[1][0]
    alike = {**wide, "moe": MIXTURE["moe"]}
    assert counts[0][0] < balanced_layers(small(alike, pp=4).recipe)[0] <= counts[1][0]


# Memory


@pytest.mark.parametrize("zero", [0, 1])
def test_experts_are_cut_by_their_own_ranks(zero: int) -> None:
    """Of 3 matrices of 8 experts: ep and expert_tp cut them, ZeRO shards them over what is left, edp, alone."""
    whole = 4 * 3 * 8 * 256 * 512
    for ep, expert_tp, edp in ((1, 1, 8), (4, 1, 2), (8, 1, 1), (2, 2, 2), (2, 4, 1)):
        own = small(tp=2, dp=4, ep=ep, expert_tp=expert_tp, zero=zero)
        (stage,) = own.stages
        cut = whole // (ep * expert_tp)
        assert own.topology.edp == edp
        assert own.expert_weights(stage) == cut
        dense = own.shared_weights(stage)
        assert dense == small(tp=2, dp=4, zero=zero).shared_weights(stage)
        kept = estimate(own).memory[0].weights / 4
        shards = (4, edp) if zero else (1, 1)
        assert kept == pytest.approx(dense / shards[0] + cut / shards[1], rel=1e-3)


def test_copies_of_a_shard_hold_experts_too() -> None:
    own = small(dp=8, ep=2, dp_replicate=2)
    assert (own.expert_shards, own.expert_replicas) == (2, 2)
    summed = [t for t in estimate(own).traffic[0] if t.what == "experts' gradients of replicas"]
    assert [(t.kind, t.ranks) for t in summed] == [("all-reduce", 2)]


KEPT: dict[str, dict[str, Any]] = {
    "experts": {},
    "many of many, raw weights": {"experts": 8, "top_k": 4, "normalize": False},
    "shared": {"shared_ffn_hidden_size": 48, "router": "sigmoid"},
}


@pytest.mark.parametrize("name", KEPT)
def test_a_block_keeps_what_is_planned(world: World, name: str) -> None:
    """To the byte; where experts are on several ranks, of all ranks together, for the router does not balance."""
    from tests.model.test_recompute import kept_bytes
    from tests.recipes import case as small_recipe
    from tests.recipes import ranks

    moe = {"experts": 4, "top_k": 2, "ffn_hidden_size": 32, **KEPT[name]}
    sets: list[Any] = ["none", "cheap", "full", {"again": ["dispatch"]}, {"again": ["gate_up"]}]
    for tp, dp, more in ((1, 1, {}), (2, 1, {"sequence_parallel": True}), (2, 1, {"expert_tp": 2}), (1, 2, {"ep": 2})):
        raw = small_recipe(tp, 1, dp, model={"num_kv_heads": 4, "moe": moe}, **more)
        found = world.run(ranks(raw), kept_bytes, raw, sets)
        held, planned = ([sum(part[i] for part in each) for each in zip(*found, strict=True)] for i in (0, 1))
        assert held == planned


# Communication


def test_groups_of_experts_lie_on_the_nodes_that_the_topology_says() -> None:
    for ep, expert_tp in ((8, 1), (4, 2), (32, 1), (16, 4)):
        own = small(
            {"moe": {**MIXTURE["moe"], "experts": 32}}, tp=4, dp=16, ep=ep, expert_tp=expert_tp, gpus_per_node=8
        )
        for axis in ("ep", "expert_tp", "edp"):
            group = axis_group(own, axis)
            assert group == (own.topology.size(axis), own.topology.nodes_of_group(axis, 0)), (ep, expert_tp, axis)


def test_bytes_of_an_exchange_by_link() -> None:
    """Of what a rank sends a part stays on it, a part on its node."""
    near, far = bytes_by_link(case("deepseek-v3"), 64.0)  # ep 64 on 8 nodes of 8
    assert (near, far) == (7.0, 56.0)
    near, far = bytes_by_link(case("mixtral-8x7b"), 64.0)  # ep 8 inside a node
    assert (near, far) == (56.0, 0.0)


def test_exchanges_are_those_of_the_layer() -> None:
    own = small({"moe": {**MIXTURE["moe"], "aux_loss": 0.1}}, tp=2, dp=4, ep=2, expert_tp=2)
    plan = estimate(own)
    planned = {(t.axis, t.kind, t.bytes): t.calls for t in plan.traffic[0] if t.axis in ("ep", "expert_tp")}
    expected: Counter[tuple[str, str, float]] = Counter()
    for one in spec.exchanges(
        tokens=512, sequences=1, hidden=256, experts=8, top_k=2, ep=2, expert_tp=2, tp=2, counts_sequences=True
    ):
        if one.axis != "tp":
            expected[one.axis, one.kind, one.bytes] += 4 * own.microbatches * (one.forward + one.backward)
    assert planned == expected
    assert plan.breakdown.expert_parallel > 0


def test_shared_experts_hide_some_of_the_exchange() -> None:
    alone, beside = small(dp=8, ep=8), small({"moe": {**MIXTURE["moe"], "shared_ffn_hidden_size": 4096}}, dp=8, ep=8)
    times = [block_work(own, experts=True).experts.forward for own in (alone, beside)]
    assert times[1] < times[0]


def test_few_rows_an_expert_are_slow() -> None:
    own = case("qwen3-30b-a3b")
    few = Change({"topology.ep": 1, "training.seq_len": 256}).apply(own)
    assert few is not None
    assert 0 < grouped_efficiency(few) < 0.6 * grouped_efficiency(own) < 0.6
    assert grouped_linear(few, 768, 2048).forward > grouped_linear(own, 768, 2048).forward / 16


def test_imbalance_costs_time_and_memory() -> None:
    even, uneven = case("mixtral-8x7b"), case("mixtral-8x7b", "hardware.imbalance=1.5")
    assert estimate(uneven).step_seconds > 1.2 * estimate(even).step_seconds
    assert block_activations(uneven, experts=True) > 1.2 * block_activations(even, experts=True)
    assert block_activations(uneven) == block_activations(even)


# What is shown


def test_plan_tells_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ("--set", "topology={pp: 4, dp: auto, ep: 8, nodes: 8, gpus_per_node: 8}")
    assert run(["plan", "mixtral-8x7b", *ranks, "--set", "hardware.imbalance=1.25"]) == 0
    out = plain(capsys.readouterr().out)
    assert "experts: ep 8 x edp 2" in out
    assert "parameters: 46.70B in all, of which a token meets 12.88B: 2 of 8 experts a layer" in out
    assert "experts: a rank holds 1 of a layer's 8; 2 ranks hold the same" in out
    assert "all-to-all: a layer sends 64.00 MiB of a rank's rows each way, 56.00 MiB of it inside the node" in out
    assert "the fullest rank gets 1.25 times" in out
    assert "ep, not hidden" in out
    assert run(["plan", "mixtral-8x7b", *ranks, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["active_parameters"] < told["parameters"] / 3
    assert told["experts"]["on_a_rank"] == 1
    assert 0.5 < told["experts"]["matmul_efficiency"] < 1
    assert told["breakdown_seconds"]["expert_parallel"] > 0
    assert run(["plan", "llama3-8b"]) == 0
    assert "expert" not in capsys.readouterr().out


def test_tune_tries_every_ep() -> None:
    own = case(
        "mixtral-8x7b",
        "model.num_layers=6",
        "training.global_batch_size=8",
        "topology={pp: 1, virtual_stages: 1, schedule: 1f1b, dp: 8, ep: 8, nodes: 1, gpus_per_node: 8}",
    )
    assert set(expert_cuts(own, 2, 1, 8)) == {(1, 1), (2, 1), (4, 1), (8, 1), (8, 2)}
    assert list(expert_cuts(case("llama3-8b"), 2, 1, 8)) == [(1, 1)]
    found = tune(own, 8, count=3)
    best = found.choices[0]
    for ep in (1, 2, 4, 8):
        other = Change({**best.change.values, "topology.ep": ep, "topology.expert_tp": 1}).apply(own)
        assert other is not None
        plan = estimate(other)
        assert not plan.fits or plan.step_seconds >= best.plan.step_seconds * 0.999
    assert any("topology.ep" in neighbour.change.values for neighbour in found.neighbours)


# What the trainer does


@pytest.mark.slow
def test_simulated_exchanges_are_the_planned_ones() -> None:
    from tplaunch.simulate.pool import processes
    from tplaunch.simulate.rank import simulate_rank

    shapes = (
        "{tp: 2, dp: 2, ep: 4, sequence_parallel: true}",
        "{tp: 2, dp: 2, ep: 2, expert_tp: 2}",
        "{pp: 2, dp: 2, ep: 2, schedule: interleavedzerobubble, virtual_stages: 2}",
    )
    cases = [
        case("quickstart-experts", f"topology={shape}", f"training.recompute={recompute}", "training.precision=bf16")
        for shape, recompute in zip(shapes, ("cheap", "{again: [dispatch]}", "none"), strict=True)
    ]
    with processes() as go:
        records = list(go(simulate_rank, [(own.recipe, 0) for own in cases]))
    for own, record in zip(cases, records, strict=True):
        plan = estimate(own)
        groups = {tuple(own.topology.group(axis, 0)) for axis in ("ep", "expert_tp") if own.topology.size(axis) > 1}
        moved = Counter((c.kind, c.bytes) for c in record.collectives if c.group in groups and c.kind == "all-to-all")
        planned: Counter[tuple[str, float]] = Counter()
        for item in plan.traffic[0]:
            if item.axis in ("ep", "expert_tp") and item.kind == "all-to-all":
                planned[item.kind, item.bytes] += round(item.calls)
        assert moved == planned
        assert plan.memory[0].allocated == pytest.approx(record.peak, rel=0.05)
