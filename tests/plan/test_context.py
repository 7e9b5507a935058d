"""Sequences shared by ranks, windows and documents, as the planner counts them."""

from __future__ import annotations

import pytest

from tests.plan.test_plan import case
from tplaunch.cli.main import run
from tplaunch.plan.communication import axis_group, collective_seconds
from tplaunch.plan.compute import Passes
from tplaunch.plan.context import context_traffic
from tplaunch.plan.estimate import Plan, block_work, estimate
from tplaunch.plan.remedies import remedies
from tplaunch.plan.tune import tune
from tplaunch.units import GiB

LONG = ("training.seq_len=131072", "training.global_batch_size=32", "topology.nodes=8")
SHARED = (*LONG, "topology={tp: 1, cp: 8, dp: auto, zero: 3, nodes: 8, gpus_per_node: 8}")


def plan(*overrides: str, name: str = "llama3-8b") -> Plan:
    return estimate(case(name, *overrides))


def seconds(of: Plan) -> float:
    return of.breakdown.compute


def test_ranks_that_share_a_sequence_do_and_hold_their_part() -> None:
    again = "training.recompute={again: [core_attention]}"  # else attention's output is kept once more
    alone, shared = (plan(*LONG, f"topology={{tp: 1, cp: {cp}, dp: 8, zero: 3, nodes: {cp}}}", again) for cp in (1, 8))
    assert shared.case.microbatches == alone.case.microbatches
    assert shared.memory[0].activations == pytest.approx(alone.memory[0].activations / 8, rel=0.01)
    assert seconds(shared) == pytest.approx(seconds(alone) / 8, rel=0.01)
    # dp x cp ranks share weights, gradients and optimizer state.
    assert shared.case.shards == 64
    assert shared.memory[0].optimizer == pytest.approx(alone.memory[0].optimizer / 8)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_gradients_are_summed_over_those_that_share_a_sequence(zero: int) -> None:
    one = plan("topology.tp=1", "topology.cp=8", f"topology.zero={zero}")
    reduced = [item for item in one.traffic[0] if item.axis == "dp" and item.kind in ("all-reduce", "reduce-scatter")]
    assert [item.ranks for item in reduced] == [8]
    assert sum(item.bytes * item.calls for item in reduced) == pytest.approx(
        one.case.weights(one.case.stages[0]) * 4 * (one.case.microbatches if zero == 2 else 1)
    )


def test_bytes_of_gathered_keys_and_values() -> None:
    """Of whole sequences, keys and values of a rank's heads; gathered in both passes, whatever is made again."""
    of = plan("topology.cp=4", "topology.tp=2", "training.micro_batch_size=2", "training.recompute=none")
    blocks = of.case.microbatches * of.case.model.num_layers
    size = 2 * 8192 * (2 * 4 * 128) * 2  # rows, tokens, 4 of 8 heads each, bf16
    shared = {item.kind: item for item in of.traffic[0] if item.axis == "cp"}
    assert {kind: (item.calls, item.bytes, item.ranks) for kind, item in shared.items()} == {
        "all-gather": (2 * blocks, size, 4),
        "all-to-all": (blocks, size, 4),
    }
    again = plan("topology.cp=4", "topology.tp=2", "training.micro_batch_size=2", "training.recompute=full")
    calls = {item.kind: item.calls for item in again.traffic[0] if item.axis == "cp"}
    assert calls == {"all-gather": 2 * blocks, "all-to-all": blocks}


def test_bytes_of_heads_for_tokens() -> None:
    """Queries, keys and values one way, the output the other; of keys and values at least a head for each rank."""
    here = ("topology.cp=8", "topology.tp=1", "topology.cp_kind=ulysses")
    of = plan(*here, "training.recompute=none")
    blocks = of.case.microbatches * of.case.model.num_layers
    head = 8192 // 8 * 128 * 2

    def shared(of: Plan) -> list[tuple[float, float]]:
        assert {item.kind for item in of.traffic[0] if item.axis == "cp"} == {"all-to-all"}
        return [(item.calls, item.bytes) for item in of.traffic[0] if item.axis == "cp"]

    assert shared(of) == [(2 * blocks, (32 + 8 + 8) * head), (2 * blocks, 32 * head)]
    assert shared(plan(*here, "training.recompute=none", "model.num_kv_heads=2")) == shared(of)
    assert [calls for calls, _ in shared(plan(*here, "training.recompute=full"))] == [3 * blocks, 3 * blocks]
    assert [calls for calls, _ in shared(plan(*here, "training.recompute=cheap"))] == [2 * blocks, 2 * blocks]
    of_norms = plan(*here, "training.recompute=cheap", "model.qk_norm=true")  # then rotary is made again
    assert [calls for calls, _ in shared(of_norms)] == [3 * blocks, 2 * blocks]


def test_what_leaves_the_node_is_slow() -> None:
    inside, across = (case("llama3-8b", *LONG, f"topology={{cp: 8, tp: {tp}, dp: 1, nodes: {tp}}}") for tp in (1, 2))
    assert (axis_group(inside, "cp").nodes, axis_group(across, "cp").nodes) == (1, 2)
    for kind in ("all-gather", "all-to-all"):
        fast, slow = (collective_seconds(of, axis_group(of, "cp"), kind, 1e9) for of in (inside, across))
        assert slow > 2 * fast, kind
    # Of an all-to-all of 8 ranks on 2 nodes half goes over each rank's own adapter.
    gpu, group = across.gpu, axis_group(across, "cp")
    expected = 0.5e9 / (gpu.network_bandwidth * gpu.link_efficiency)
    assert collective_seconds(across, group, "all-to-all", 1e9) == pytest.approx(expected, rel=0.01)


def test_the_query_projection_hides_the_gathering() -> None:
    of = case("llama3-8b", *SHARED)
    gather, back = context_traffic(of, Passes(0.0), Passes(0.0)).all
    half = Passes(gather.seconds / 2)
    assert context_traffic(of, half, Passes(0.0)).forward == pytest.approx(gather.seconds / 2)
    assert context_traffic(of, half, half).backward == pytest.approx(gather.seconds + back.seconds)
    plenty = Passes(1.0, 1.0, 1.0)
    assert context_traffic(of, plenty, plenty)[1:] == () and context_traffic(of, plenty, plenty).backward == 0.0
    assert 0 < block_work(of).context.forward < gather.seconds


def test_a_pipeline_sends_the_ranks_part() -> None:
    sent = [
        next(
            item for item in plan("topology.tp=1", f"topology.cp={cp}", "topology.pp=2").traffic[0] if item.axis == "pp"
        )
        for cp in (1, 4)
    ]
    assert sent[1].bytes == sent[0].bytes / 4


def test_documents_make_attention_shorter_and_take_no_mask() -> None:
    whole, apart = (plan("training.seq_len=131072", f"training.document_mask={mask}") for mask in ("false", "true"))
    assert apart.memory[0].total < whole.memory[0].total + GiB  # 16 GiB are [s, s] bytes
    assert apart.tokens_per_second > 3 * whole.tokens_per_second
    assert apart.model_flops_per_token < whole.model_flops_per_token / 3
    known = plan("training.seq_len=131072", "training.document_mask=true", "data.document_length=65536")
    assert whole.tokens_per_second < known.tokens_per_second < apart.tokens_per_second


def test_windows_are_charged_where_they_are() -> None:
    full, mixed, near = (
        plan("training.seq_len=131072", *more)
        for more in (
            [],
            ["model.window=4096", "model.window_layers=[window, window, window, full]"],
            ["model.window=4096"],
        )
    )
    saved = seconds(full) - seconds(near)
    assert seconds(near) < seconds(full) / 3
    assert seconds(full) - seconds(mixed) == pytest.approx(0.75 * saved, rel=1e-6)
    assert full.model_flops_per_token - mixed.model_flops_per_token == pytest.approx(
        0.75 * (full.model_flops_per_token - near.model_flops_per_token)
    )
    assert near.memory == full.memory
    # The second stage has the two full layers of four.
    staged = plan("model.num_layers=4", "topology={tp: 4, pp: 2, stage_layers: [2, 2]}", "model.window=64",
                  "model.window_layers=[window, window, full, full]", "training.seq_len=131072")  # fmt: skip
    assert staged.works[1].passes.forward > 3 * staged.works[0].passes.forward


def test_tune_shares_long_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    short = tune(case("llama3-8b"), 8, count=4)
    assert not any("topology.cp" in choice.change.values for choice in short.choices)
    long = ["--set", "training.seq_len=32768", "--set", "training.global_batch_size=1"]
    assert run(["tune", "llama3-8b", "--gpus", "8", *long]) == 0
    out = capsys.readouterr().out
    heading = next(line for line in out.splitlines() if "recompute" in line)
    assert heading.split()[:3] == ["tp", "cp", "pp"]
    assert "8 ulysses" in out and "8 allgather" in out
    assert "topology.cp_kind=" in out.partition("One step from the best")[2]


def test_remedies_name_it_where_activations_do_not_fit() -> None:
    big = plan(*LONG, "topology={tp: 8, dp: auto, nodes: 8, gpus_per_node: 8}", "model.num_layers=64")
    assert not big.fits
    assert any("topology.cp" in remedy.change.values for remedy in remedies(big, count=20))
    short = plan("training.micro_batch_size=16", "model.num_layers=64")
    assert not any("topology.cp" in remedy.change.values for remedy in remedies(short))


def test_what_plan_says_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama3-8b-128k", "--rank", "13"]) == 0
    out = capsys.readouterr().out
    assert "tp 1, cp 8 (allgather), pp 1, dp 8" in out
    assert "a rank holds 16,384 tokens of each sequence; keys and values are gathered inside a node" in out
    assert "taken to be 32,768 tokens long" in out
    assert "as tp/cp/dp/pp" in out and "13 0/5/1/0" in out
    assert "rank 13: tp=0 cp=5 dp=1 pp=0, node 1" in out
    assert "cp group: 8, 9, 10, 11, 12, 13, 14, 15" in out
    assert run(["plan", "llama3-405b-128k"]) == 0
    assert "over the network, between 16 nodes" in capsys.readouterr().out
    assert run(["plan", "llama3-8b"]) == 0
    assert "cp" not in capsys.readouterr().out
