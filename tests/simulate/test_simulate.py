"""`tplaunch simulate`: one rank of any world, alone; and whether the ranks of a world fit together."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tplaunch.check.recipe import check_recipe
from tplaunch.cli.main import run
from tplaunch.cli.views.simulation import axis
from tplaunch.errors import Exit
from tplaunch.plan.case import Case
from tplaunch.plan.estimate import estimate
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.shipped import shipped_recipes
from tplaunch.simulate.agree import deadlock, differing_collective
from tplaunch.simulate.pool import processes
from tplaunch.simulate.rank import RankRecord, pipeline_messages, simulate_rank
from tplaunch.simulate.record import Message
from tplaunch.simulate.world import ends_and_middle, shortened, simulate
from tplaunch.spec.gpu import find_gpu
from tplaunch.spec.topology import Topology

SCHEDULES = {
    "1f1b": 1,
    "gpipe": 1,
    "interleaved1f1b": 2,
    "interleavedzerobubble": 2,
    "zbvzerobubble": 2,
    "dualpipev": 2,
}


def case(name: str, *settings: str) -> Case:
    checked = check_recipe(load_recipe(name, settings), need_data=False)
    return Case(checked.recipe, find_gpu(checked.recipe.hardware.gpu or "h100-80gb"))


def pipeline(schedule: str) -> Case:
    return case(
        "quickstart",
        f"topology={{tp: 2, pp: 4, dp: 1, schedule: {schedule}, virtual_stages: {SCHEDULES[schedule]}}}",
        "model.num_layers=8",
        "training.micro_batch_size=1",
        "training.global_batch_size=8",
    )


def listen(of: Case) -> dict[int, list[Message]]:
    ranks = of.topology.group("pp", 0)
    with processes() as go:
        jobs = [(of.recipe, rank) for rank in ranks]
        return dict(zip(ranks, go(pipeline_messages, jobs), strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_of_every_schedule_arrive(schedule: str) -> None:
    messages = listen(pipeline(schedule))
    assert deadlock(messages) is None
    kinds = Counter(m.kind for said in messages.values() for m in said)
    assert kinds["send"] == kinds["receive"] >= 8 * 2 * 3


def test_another_order_on_one_rank_is_found() -> None:
    messages = listen(pipeline("interleaved1f1b"))
    second = messages[2]
    # Microbatch 1 before 0, as a rank with another schedule would have it.
    sends = [i for i, m in enumerate(second) if m.kind == "send" and m.what.startswith("output of stage 1,")]
    first, later = sends[:2]
    swapped = list(second)
    swapped[first] = replace(second[first], what=second[later].what)
    swapped[later] = replace(second[later], what=second[first].what)
    found = deadlock({**messages, 2: swapped})
    assert found is not None
    assert "rank 2 waits to send the output of stage 1, microbatch 1" in found
    assert "waits to receive the output of stage 1, microbatch 0" in found


def test_two_ranks_that_both_receive_first() -> None:
    send, receive = (Message(kind, peer, 8, "x", 1) for kind, peer in (("send", 1), ("receive", 1)))
    ours = [receive, replace(send, batch=2)]
    theirs = [replace(receive, peer=0), replace(send, peer=0, batch=2)]
    assert deadlock({0: ours, 1: theirs}) is not None
    together = [replace(message, batch=1) for message in ours]
    assert deadlock({0: together, 1: [replace(message, batch=1) for message in theirs]}) is None


def alone(folder: Path) -> bool:
    """Whether no other process does this at the same time."""
    try:
        (folder / "busy").mkdir()
    except FileExistsError:
        return False
    time.sleep(0.5)
    (folder / "busy").rmdir()
    return True


def test_no_more_at_once_than_the_cores_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # a node, of which Slurm gives one core
    os.sched_setaffinity(0, {min(ours)})
    try:
        with processes() as go:
            assert list(go(alone, [(tmp_path,)] * 3)) == [True] * 3
    finally:
        os.sched_setaffinity(0, ours)


@pytest.fixture(scope="module")
def tp_pair() -> list[RankRecord]:
    of = case("quickstart", "topology={tp: 2, pp: 1, dp: 2, sequence_parallel: true}", "training.micro_batch_size=2")
    with processes() as go:
        return list(go(simulate_rank, [(of.recipe, rank) for rank in (0, 1)]))


def test_collectives_of_a_group(tp_pair: list[RankRecord]) -> None:
    first, second = tp_pair
    assert differing_collective(0, first.collectives, 1, second.collectives) is None
    tp = [i for i, c in enumerate(second.collectives) if c.group == (0, 1)]
    changed = list(second.collectives)
    changed[tp[3]] = replace(changed[tp[3]], bytes=changed[tp[3]].bytes + 1)
    assert "collective 4 of their group of 2" in str(differing_collective(0, first.collectives, 1, changed))
    del changed[tp[-1]]
    assert differing_collective(0, first.collectives, 1, changed) is not None


def test_ranks_that_share_sequences_exchange_and_hold_what_is_planned() -> None:
    cases = [
        case(
            "quickstart",
            f"topology={{tp: 2, cp: 2, pp: 1, dp: 1, cp_kind: {kind}, sequence_parallel: true}}",
            "model={hidden_size: 256, num_layers: 4, num_heads: 8, num_kv_heads: 4, ffn_hidden_size: 512}",
            "training={seq_len: 4096, micro_batch_size: 1, global_batch_size: 1, precision: bf16, loss_chunk: 256}",
        )
        for kind in ("allgather", "ulysses")
    ]
    with processes() as go:
        records = list(go(simulate_rank, [(of.recipe, rank) for of in cases for rank in (0, 2)]))
    for of, first, second in zip(cases, records[::2], records[1::2], strict=True):
        assert differing_collective(0, first.collectives, 2, second.collectives) is None
        plan = estimate(of)
        moved = Counter((c.kind, c.bytes) for c in first.collectives if c.group == (0, 2) and "all-to-all" in c.kind)
        assert moved == {
            (t.kind, t.bytes): t.calls for t in plan.traffic[0] if t.axis == "cp" and "all-to-all" in t.kind
        }
        assert plan.memory[0].allocated == pytest.approx(first.peak, rel=0.05)


def test_muon_exchanges_what_is_planned() -> None:
    """Matrices go to the ranks that orthogonalise them, and back; how much a rank has may differ from its peers'."""
    of = case(
        "quickstart",
        "topology={tp: 2, pp: 2, dp: 2}",
        "model={hidden_size: 128, num_layers: 10, num_heads: 8, num_kv_heads: 4, ffn_hidden_size: 320}",
        "optimizer.name=muon",
    )
    with processes() as go:
        records = list(go(simulate_rank, [(of.recipe, rank) for rank in range(4)]))
    moved = [[c for c in record.collectives if c.kind == "all-to-all"] for record in records]
    planned = [t for t in estimate(of).traffic[0] if t.axis == "stage"]
    assert {c.group for each in moved for c in each} == {(0, 1, 2, 3)}
    assert all(len(each) == sum(t.calls for t in planned) for each in moved)
    mean = sum(c.bytes for each in moved for c in each) / 4
    assert mean == pytest.approx(sum(t.calls * t.bytes for t in planned), rel=0.1)
    assert len({sum(c.bytes for c in each) for each in moved}) > 1
    for record in records[1:]:
        assert differing_collective(0, records[0].collectives, record.rank, record.collectives) is None


def test_ranks_of_dp_and_cp_together_are_of_dp() -> None:
    topology = Topology(tp=2, cp=2, dp=2, pp=2)
    groups = [topology.group("tp", 0), topology.group("cp", 0), (0, 2, 4, 6), topology.group("pp", 0), tuple(range(16))]
    assert [axis(topology, tuple(group)) for group in groups] == ["tp", "cp", "dp", "pp", "world"]


def test_ranks_are_called_after_experts_where_these_are_shared() -> None:
    assert axis(Topology(tp=2, dp=2), (0, 1, 2, 3)) == "world", "of a dense model"
    topology = Topology(tp=4, dp=4, ep=2)
    assert axis(topology, tuple(topology.group("edp", 0))) == "edp"
    assert axis(topology, (0, 1), "all-to-all") == "ep"


def test_ranks_that_share_experts_are_told_apart() -> None:
    topology = Topology(tp=2, cp=2, dp=4, pp=2, ep=4, expert_tp=2)
    assert axis(topology, tuple(topology.group("ep", 0)), "all-to-all") == "ep"
    assert axis(topology, tuple(topology.group("edp", 0))) == "dp"  # as they are
    assert axis(Topology(tp=2, dp=4, ep=2), (0, 2, 4, 6), "all-reduce") == "dp"
    assert axis(Topology(tp=2, dp=4, ep=4), (0, 1, 2, 3)) == "ep"
    assert axis(topology, (0, 1), "all-to-all") == "expert_tp" and axis(topology, (0, 1), "all-gather") == "tp"
    alike = Topology(cp=2, dp=2, ep=2)  # the ranks that share a sequence share experts, too
    assert axis(alike, (0, 1), "all-to-all") == "cp" and axis(Topology(dp=2, ep=2), (0, 1), "all-to-all") == "ep"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_a_rank_reduces_and_gathers_once_however_many_stages_it_has(zero: int) -> None:
    of = case(
        "quickstart",
        f"topology={{tp: 1, pp: 2, dp: 2, zero: {zero}, schedule: interleaved1f1b, virtual_stages: 4}}",
        "model.num_layers=8",
        "training.micro_batch_size=1",
        "training.global_batch_size=16",
    )
    with processes() as go:
        (record,) = go(simulate_rank, [(of.recipe, 0)])
    seen = Counter(c.kind for c in record.collectives if c.group == (0, 1) and c.bytes > 64)
    planned = {t.kind: t.calls for t in estimate(of).traffic[0] if t.axis == "dp"}
    assert seen == ({"all-reduce": 4 + 1} if zero == 0 else {"all-gather": 4 * 9 + 1, "reduce-scatter": 4 * 9 + 1})
    assert planned == ({"all-reduce": 4} if zero == 0 else seen)  # blocks; the embedding goes with the first


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "quickstart", "--gpu", "h100-80gb"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "tp 2 x pp 2 x dp 2 = 8 ranks" in out
    assert "fit together" in out


def test_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "quickstart", "--rank", "8"]) == Exit.USAGE
    assert "there is no rank 8" in capsys.readouterr().err
    assert run(["simulate", "llama3-70b-tp4"]) == Exit.USAGE
    assert "`tplaunch plan llama3-70b-tp4` says what would" in capsys.readouterr().err
    mine = tmp_path / "my own.yaml"
    mine.write_text(shipped_recipes()["llama3-70b-tp4"].read_text())
    assert run(["simulate", str(mine)]) == Exit.USAGE
    assert f"`tplaunch plan '{mine}'` says what would" in capsys.readouterr().err


def test_ranks_of_the_ends_and_the_middle() -> None:
    assert ends_and_middle(Topology(tp=8, dp=128, pp=16)) == [0, 8192, 15360]
    assert ends_and_middle(Topology(tp=8, dp=2)) == [0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_are_those_of_the_whole_trainer(schedule: str) -> None:
    of = pipeline(schedule)
    messages = listen(of)
    with processes() as go:
        for record in go(simulate_rank, [(of.recipe, rank) for rank in messages]):
            assert record.messages == messages[record.rank]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("schedule", ["interleaved1f1b", "interleavedzerobubble", "zbvzerobubble"])
def test_sequences_are_gathered_as_often_as_planned(schedule: str) -> None:
    of = case(
        "quickstart",
        f"topology={{tp: 2, pp: 2, dp: 1, sequence_parallel: true, schedule: {schedule}, virtual_stages: 2}}",
        "model.num_layers=8",
        "training.micro_batch_size=1",
        "training.global_batch_size=8",
    )
    with processes() as go:
        records = list(go(simulate_rank, [(of.recipe, rank) for rank in (0, 2)]))
    for place, record in enumerate(records):
        tp = tuple(of.topology.group("tp", record.rank))
        seen = sum(c.kind == "all-gather" and c.group == tp for c in record.collectives)
        planned = sum(t.calls for t in estimate(of).traffic[place] if (t.axis, t.kind) == ("sp", "all-gather"))
        ends = sum(stage.first + stage.last for stage in of.stages_on(place))  # not in the plan's blocks
        assert seen == planned + ends * of.microbatches


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_means_over_heads_are_taken_as_often_as_planned(recompute: str) -> None:
    of = case(
        "quickstart",
        "topology={tp: 2, pp: 1, dp: 1, sequence_parallel: true}",
        "model={qk_norm: true, qk_norm_all_heads: true}",
        "training.micro_batch_size=1",
        "training.global_batch_size=2",
        "training.loss_chunk=32",  # else its statistics are as large
        f"training.recompute={recompute}",
    )
    with processes() as go:
        (record,) = go(simulate_rank, [(of.recipe, 0)])
    (planned,) = (t for t in estimate(of).traffic[0] if t.what == "means over heads")
    tp, again = tuple(of.topology.group("tp", 0)), 2 * (recompute == "cheap")
    seen = [c for c in record.collectives if (c.kind, c.group, c.bytes) == ("all-reduce", tp, planned.bytes)]
    assert len(seen) == planned.calls == of.microbatches * of.model.num_layers * (4 + again)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_shortened_step_holds_as_much() -> None:
    whole = case("quickstart", "topology={tp: 2, pp: 2, dp: 1}", "training.global_batch_size=64")
    short = shortened(whole)
    assert short.microbatches < whole.microbatches
    with processes() as go:
        jobs = [(of.recipe, rank) for of in (whole, short) for rank in (0, 2)]
        *wholes, first, last = go(simulate_rank, jobs)
    for ours, theirs in zip((first, last), wholes, strict=True):
        tokens = (whole.microbatches - short.microbatches) * whole.tokens * 2 * 8  # the batch itself, int64
        assert theirs.peak - tokens == pytest.approx(ours.peak, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        *("llama3-8b", "llama3-8b-128k", "llama3-70b", "llama3-405b", "llama3-405b-128k"),
        *("megatron-1t", "gpt3-175b", "gpt2-124m", "qwen3-8b"),
    ],
)
def test_shipped_recipes(name: str) -> None:
    of = shortened(case(name))
    simulation = simulate(of, ends_and_middle(of.topology))
    assert simulation.problems == []
    for record in simulation.records:
        planned = simulation.plan.memory[of.topology.coordinates(record.rank).pp].allocated
        print(f"{name} rank {record.rank}: {record.peak / 2**30:.2f} GiB, planned {planned / record.peak - 1:+.1%}")
        assert planned == pytest.approx(record.peak, rel=0.05)
