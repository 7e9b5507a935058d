"""`tplaunch plan` and `tune`: what they print, refuse and write, and that they agree with the checks."""

from __future__ import annotations

import json
import random
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from tplaunch.check.recipe import check_recipe
from tplaunch.check.rules import can_run
from tplaunch.cli.main import run
from tplaunch.cli.views.plan import rank_map
from tplaunch.cli.views.table import plain
from tplaunch.cli.views.timeline import timeline_text
from tplaunch.errors import RecipeError, TplaunchError
from tplaunch.plan.case import Case
from tplaunch.plan.change import Change, with_values
from tplaunch.plan.communication import Group, Kind, axis_group, collective_seconds
from tplaunch.plan.estimate import Plan, block_work, block_works, estimate
from tplaunch.plan.recomputation import HEADROOM, options
from tplaunch.plan.remedies import remedies
from tplaunch.plan.run import plan_run
from tplaunch.plan.timeline import pipeline_timeline, timeline_svg, timeline_trace
from tplaunch.plan.tune import candidates, quick_look, tune
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Part, Recipe
from tplaunch.recipe.shipped import shipped_recipes
from tplaunch.spec.gpu import GPUS, detect_gpu, find_gpu, write_gpu

ATTENTION: list[Part] = ["qkv", "rotary", "core_attention", "attention_output"]
LARGE = ["llama3-8b", "llama3-70b", "llama3-405b", "megatron-1t", "gpt3-175b", "gpt2-124m", "qwen3-8b"]
LONG = ["llama3-8b-128k", "llama3-405b-128k"]


def case(name: str, *overrides: str) -> Case:
    checked = check_recipe(load_recipe(name, overrides), need_data=False)
    gpu = checked.recipe.hardware.gpu
    return Case(checked.recipe, find_gpu(gpu) if gpu else GPUS["h100-80gb"])


# What ships


@pytest.mark.parametrize("name", [*LARGE, *LONG, "quickstart"])
def test_shipped_recipes_fit(name: str) -> None:
    own = case(name)
    whole = plan_run(own.recipe, own.gpu)
    assert whole.fits, f"{name}: {whole.fullest.plan.headroom}"
    if name != "quickstart":
        assert 0.25 < max(whole.stages, key=lambda stage: stage.gpu_hours).plan.mfu < 0.65
    assert {*LARGE, *LONG, "quickstart", "llama3-70b-tp4"} <= set(shipped_recipes())


def test_70b_on_four_gpus_serves_but_does_not_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama3-70b-tp4"]) == 2
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "for inference alone the bf16 weights take 141 GB, 35.3 GB a GPU: fits" in out
    assert out.count("  fix: --set ") == 3


def test_405b_is_the_reports_run() -> None:
    own = case("llama3-405b")
    whole = plan_run(own.recipe, own.gpu)
    assert {stage.plan.case.topology.world_size for stage in whole.stages} == {16_384}
    assert whole.tokens == pytest.approx(15.6e12, rel=0.01)
    assert whole.total_flops == pytest.approx(3.8e25, rel=0.12)  # arXiv 2407.21783, section 1: with 6 N D
    assert whole.as_dict()["total_flops_of_1e25"] > 1
    assert whole.gpu_hours == pytest.approx(30.84e6, rel=0.25)  # Llama 3.1 405B's model card


# The command


def test_json_says_all_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama3-70b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["step_seconds"] == pytest.approx(sum(plan["breakdown_seconds"].values()))
    assert plan["tokens_per_s"] * plan["step_seconds"] == pytest.approx(plan["tokens_per_step"])
    for rank in plan["memory"]:
        parts = {k: v for k, v in rank.items() if k not in ("total", "allocated")}
        assert rank["total"] == pytest.approx(sum(parts.values()))
    assert plan["memory_bytes"] - plan["headroom_bytes"] == max(rank["total"] for rank in plan["memory"])
    assert {item["axis"] for item in plan["traffic"][0]} == {"sp", "pp", "dp"}


def test_a_gpu_can_be_named_or_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated = tmp_path / "ours.json"
    write_gpu(replace(GPUS["h200"], name="ours", matmul_efficiency=0.5), calibrated)
    speeds = []
    for gpu in ("h200", str(calibrated)):
        assert run(["plan", "llama3-8b", "--gpu", gpu, "--json"]) == 0
        speeds.append(json.loads(capsys.readouterr().out)["tokens_per_s"])
    assert speeds[1] < speeds[0]
    assert run(["plan", "llama3-8b", "--gpu", "h900"]) == 2
    assert "no GPU is called 'h900'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"name": "x"}', '{"nam": 1}', "\x00", json.dumps({**vars(GPUS["h200"]), "power": -1})],
)
def test_bad_gpu_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(TplaunchError):
        find_gpu(str(path))
    with pytest.raises(TplaunchError, match="not a GPU description"):
        find_gpu(str(tmp_path / "absent.json"))


def test_devices_are_known_by_their_drivers_names() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100-80gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
        "NVIDIA GB200": "gb200",
        "AMD Instinct MI300X": "mi300x",
    }
    for device, name in names.items():
        found = detect_gpu(device)
        assert found is not None
        assert found.name == name
    assert detect_gpu("NVIDIA GeForce RTX 3090") is None


@pytest.mark.parametrize("name", LARGE)
def test_the_rank_map_keeps_to_120_columns_and_shows_whole_nodes(name: str) -> None:
    lines = plain(rank_map(case(name))).splitlines()
    assert max(map(len, lines)) <= 120
    assert all(f" {rank} " in " ".join(lines) for rank in range(8))


def test_a_rank_is_shown_with_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama3-70b", "--rank", "77"]) == 0
    out = capsys.readouterr().out
    assert "rank 77: tp=5 dp=9 pp=0, node 9" in out
    assert "tp group: 72, 73, 74, 75, 76, 77, 78, 79" in out
    assert "stage 4: layers 21 to 25" in out
    assert "ep group" not in out
    assert run(["plan", "mixtral-8x7b", "--rank", "9"]) == 0
    out = capsys.readouterr().out
    assert "  ep group: 8, 9, 10, 11, 12, 13, 14, 15\n  edp group: 1, 9, 17, 25\n" in out
    assert "expert_tp group" not in out
    assert run(["plan", "llama3-70b", "--rank", "512"]) == 2
    assert "there is no rank 512" in capsys.readouterr().err


def test_without_a_gpu_it_plans_for_one_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert run(["plan", "quickstart", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["gpu"] == "h100-80gb"
    assert "--gpu plans for another" in captured.err


# Pictures


def test_timeline_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, trace = tmp_path / "step.svg", tmp_path / "step.json"
    assert run(["plan", "llama3-70b", "--timeline", str(picture)]) == 0
    assert run(["plan", "llama3-70b", "--timeline", str(trace)]) == 0
    assert "https://ui.perfetto.dev" in capsys.readouterr().out
    root = ET.fromstring(picture.read_text())
    boxes = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("stroke") == "#ffffff"]
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 2 * 32 * 16  # forward and backward of 32 microbatches in 16 stages
    assert len(boxes) == len(events)
    assert run(["plan", "llama3-70b", "--timeline", str(tmp_path / "step.png")]) == 2
    assert run(["plan", "llama3-70b", "--timeline", str(tmp_path / "no" / "step.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("pp", [4, 16, 64])
def test_pictures_show_every_rank_without_overlap(pp: int) -> None:
    own = case("megatron-1t", f"topology.pp={pp}", f"topology.nodes={6 * pp}")
    timeline, shown = pipeline_timeline(own)
    assert pp <= shown <= own.microbatches
    text = plain(timeline_text(timeline, width=80)).splitlines()
    assert len(text) == pp + 1
    assert {len(line) for line in text[1:]} == {84}
    svg = ET.fromstring(timeline_svg(timeline, "a <title> & more"))
    height = float(svg.get("height", "0"))
    for box in svg.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("y", "0")) + float(box.get("height", "0")) <= height
        assert float(box.get("x", "0")) + float(box.get("width", "0")) <= 1601
    spans: dict[int, float] = {}
    for event in json.loads(timeline_trace(timeline))["traceEvents"]:
        if event["ph"] == "X":
            assert event["ts"] >= spans.get(event["tid"], 0.0) - 1e-3
            spans[event["tid"]] = event["ts"] + event["dur"]
    assert set(spans) == set(range(pp))


# Communication


def test_groups_lie_on_the_nodes_that_the_topology_says() -> None:
    for name in ("llama3-70b", "qwen3-8b", "gpt2-124m"):
        own = case(name)
        for axis in ("tp", "pp"):
            assert axis_group(own, axis) == Group(own.topology.size(axis), own.topology.nodes_of_group(axis, 0))
        assert axis_group(own, "dp").nodes == own.topology.nodes_of_group("dp", 0)


def test_ring_collectives_take_what_they_move() -> None:
    own = case("llama3-8b")
    size, bandwidth = 1e9, own.gpu.link_bandwidth * own.gpu.link_efficiency
    group = Group(8, 1)
    gather = collective_seconds(own, group, "all-gather", size)
    assert gather == pytest.approx(7 / 8 * size / bandwidth, rel=0.05)
    assert collective_seconds(own, group, "all-reduce", size) == pytest.approx(2 * gather)
    assert collective_seconds(own, Group(1, 1), "all-reduce", size) == 0.0
    # Across nodes the network binds; eight ranks on each node share eight adapters.
    across = collective_seconds(own, Group(16, 2), "all-gather", size)
    alone = collective_seconds(own, Group(2, 2), "all-gather", size)
    assert gather < across < alone


# Legality, remedies, tuning


def verdict(recipe: Recipe) -> bool:
    """What `tplaunch recipe check` says of a recipe."""
    loaded = load_recipe("llama3-8b")
    try:
        check_recipe(loaded._replace(recipe=recipe), need_data=False)
    except RecipeError:
        return False
    return True


def test_quick_rules_are_those_of_the_checks() -> None:
    source = random.Random(0)
    own = case("llama3-8b", "training.compile=false", "training.global_batch_size=96")
    seen = {True: 0, False: 0}
    for _ in range(600):
        tp, pp, dp = (source.choice([1, 2, 3, 4, 6, 8, 16]) for _ in range(3))
        cp = source.choice([1, 1, 1, 2, 3, 16])
        schedule = source.choice(
            ["gpipe", "1f1b", "interleaved1f1b", "interleavedzerobubble", "zbvzerobubble", "dualpipev"]
        )
        values = {
            "topology.tp": tp,
            "topology.cp": cp,
            "topology.cp_kind": source.choice(["allgather", "ulysses"]),
            "topology.pp": pp,
            "topology.dp": dp,
            "topology.schedule": schedule,
            "topology.virtual_stages": source.choice([1, 2, 2, 3]) if pp > 1 else 1,
            "topology.zero": source.choice([0, 1, 2, 3]),
            "topology.nodes": 1,
            "topology.gpus_per_node": tp * cp * pp * dp,
            "topology.stage_layers": None,
            "training.micro_batch_size": source.choice([1, 2, 3]),
            "training.compile": source.choice([True, False]),
        }
        recipe = with_values(own.recipe, values)
        legal = can_run(recipe)
        seen[legal] += 1
        assert legal == (Change(values).apply(own) is not None) == verdict(recipe), str(values)
    assert min(seen.values()) > 50


def test_remedies_fit_are_legal_and_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    too_big = estimate(case("llama3-70b", "training.micro_batch_size=4"))
    assert not too_big.fits
    found = remedies(too_big)
    assert len(found) == 3
    for remedy in found:
        assert remedy.plan.fits
        assert verdict(remedy.plan.case.recipe)
    assert found == sorted(found, key=lambda r: (r.plan.case.topology.world_size, r.price))
    # What is printed works as it stands.
    assert run(["plan", "llama3-70b", "--set", "training.micro_batch_size=4"]) == 2
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  fix: "))
    arguments = shlex.split(line.removeprefix("  fix: ").partition("  (")[0])
    assert run(["plan", "llama3-70b", "--set", "training.micro_batch_size=4", *arguments]) == 0


def test_tune_ranks_what_fits_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = tmp_path / "the best.yaml"
    assert run(["tune", "llama3-8b", "--gpus", "16", "--write", str(best)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"wrote '{best}': tplaunch plan '{best}'\n")
    assert "Best of" in out
    assert "One step from the best" in out
    assert run(["plan", str(best), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["topology"]["world_size"] == 16
    assert run(["tune", "llama3-8b", "--gpus", "16", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert len(tuned["choices"]) == 10
    speeds = [choice["tokens_per_s"] for choice in tuned["choices"]]
    assert speeds == sorted(speeds, reverse=True)
    assert plan["tokens_per_s"] == pytest.approx(speeds[0])
    assert all(choice["headroom_bytes"] >= HEADROOM * choice["memory_bytes"] for choice in tuned["choices"])
    assert all(n["why"] for n in tuned["neighbours"])


def test_tune_does_not_read_the_topology_of_the_recipe() -> None:
    ways = ("{tp: 8, dp: auto}", "{tp: 1, pp: 4, dp: auto, zero: 0, schedule: gpipe, stage_layers: [5, 9, 9, 9]}")
    found = [tune(case("llama3-8b", f"topology={way}"), 8, count=2) for way in ways]
    assert found[0].choices[0].change == found[1].choices[0].change
    assert (found[0].legal, found[0].fitting) == (found[1].legal, found[1].fitting)


@pytest.mark.slow
def test_tune_misses_nothing_that_planning_everything_finds() -> None:
    own = case("llama3-8b", "training.compile=false", "training.global_batch_size=32")
    best: Plan | None = None
    quick: list[tuple[float, float]] = []
    for change in candidates(own, 8, 8):
        kept_all = change.apply(own)
        for option in options(kept_all) if kept_all is not None else ():
            candidate = Change({**change.values, "training.recompute": option.value}).apply(own)
            assert candidate is not None
            plan = estimate(candidate)
            glance = quick_look(candidate, block_works(candidate))
            if plan.headroom >= HEADROOM * plan.case.gpu.memory:
                best = plan if best is None or plan.step_seconds < best.step_seconds else best
                if glance is not None:
                    quick.append((glance, plan.step_seconds))
    assert best is not None
    found = tune(own, 8).choices[0].plan
    assert found.step_seconds == pytest.approx(best.step_seconds)
    errors = [abs(glance / full - 1) for glance, full in quick]
    assert sum(error < 0.1 for error in errors) > 0.85 * len(errors)


def test_tune_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "llama3-405b", "--gpus", "8"]) == 2
    assert "no topology on 8 x h100-80gb fits" in capsys.readouterr().err
    assert run(["tune", "llama3-8b", "--gpus", "37"]) == 2  # more pipeline ranks than layers
    assert "can run this model with this global batch" in capsys.readouterr().err


def test_plans_grow_as_they_should() -> None:
    def plan(*overrides: str) -> Plan:
        return estimate(case("llama3-8b", *overrides))

    base = plan()
    assert plan("training.seq_len=4096").step_seconds < base.step_seconds
    assert plan("training.recompute=full").step_seconds > base.step_seconds
    assert plan("training.recompute=full").hardware_flops_per_token > base.hardware_flops_per_token
    hours = [plan_run(case("llama3-8b", f"training.steps={count}").recipe, base.case.gpu).gpu_hours for count in (2, 4)]
    assert hours[1] == pytest.approx(2 * hours[0]) == pytest.approx(2 * 2 * base.step_seconds * 8 / 3600)
    assert plan("hardware.gpu=a100-80gb").step_seconds > base.step_seconds


@pytest.mark.parametrize(
    ("recompute", "made", "collectives"),
    [
        ("cheap", ["norm", "norm", "activation"], {}),
        ("{again: [core_attention]}", ["core_attention"], {}),
        ("{again: [norm, gate_up]}", ["norm", "norm", "gate_up"], {"all-gather": 1}),
        ("{again: [attention_output]}", ["attention_output"], {"reduce-scatter": 1}),
        ("{save: [gate_up, down]}", [*["norm"] * 2, *ATTENTION, "activation"], {"all-gather": 1, "reduce-scatter": 1}),
        ("full", [*["norm"] * 2, *ATTENTION, "gate_up", "activation"], {"all-gather": 2, "reduce-scatter": 1}),
    ],
)
def test_what_is_made_again_takes_its_forward_pass_once_more(
    recompute: str, made: list[Part], collectives: dict[Kind, int]
) -> None:
    none, again = (estimate(case("llama3-8b", f"training.recompute={way}")) for way in ("none", recompute))
    work = block_work(again.case)
    passes = again.case.microbatches * again.case.model.num_layers
    sent = sum(count * work.traffic.call_seconds[kind] for kind, count in collectives.items())
    seconds = sum(work.parts[part].forward for part in made) + sent
    assert again.breakdown.recompute == pytest.approx(passes * seconds)
    assert again.breakdown.compute == none.breakdown.compute
    calls = [{item.kind: item.calls for item in plan.traffic[0] if item.axis == "sp"} for plan in (none, again)]
    assert {kind: calls[1][kind] - calls[0][kind] for kind in calls[0]} == {
        kind: passes * collectives.get(kind, 0) for kind in calls[0]
    }


def test_muon_keeps_less_and_multiplies_more() -> None:
    """llama3-8b's hidden matrices by hand: 4 of attention and 3 of the MLP in each of 32 layers."""
    adamw, muon = (estimate(case("llama3-8b", f"optimizer.name={name}")) for name in ("adamw", "muon"))
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3
    weights = 32 * sum(m * n for m, n in shapes) / 8
    assert adamw.memory[0].optimizer - muon.memory[0].optimizer == pytest.approx(4 * weights)
    flops = 32 * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes) / 8
    gpu = muon.case.gpu
    seconds = flops / (gpu.peak["bf16"] * gpu.matmul_efficiency)
    assert muon.breakdown.optimizer - adamw.breakdown.optimizer == pytest.approx(seconds, rel=0.1)
    rows = {item.what: item for item in muon.traffic[0] if item.axis == "stage"}
    assert {what: item.calls * item.bytes for what, item in rows.items()} == {
        "gradients of matrices": pytest.approx(2 * weights),
        "updates of matrices": pytest.approx(2 * weights),
    }
    assert all(item.kind == "all-to-all" and item.exposed == item.seconds > 0 for item in rows.values())
    whole = estimate(
        case("llama3-8b", "optimizer.name=muon", "topology={tp: 1, dp: 8, zero: 0, sequence_parallel: false}")
    )
    (back,) = (item for item in whole.traffic[0] if item.what == "updates of matrices")
    assert back.calls * back.bytes == pytest.approx(8 * 2 * weights), "every rank gets all"
