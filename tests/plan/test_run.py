"""The plan of a whole run: sums over its stages and batch sizes against a hand's, and what it prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tplaunch.check.recipe import check_recipe
from tplaunch.cli.main import run
from tplaunch.cli.views.table import plain
from tplaunch.errors import Exit
from tplaunch.plan.case import Case
from tplaunch.plan.communication import send_seconds
from tplaunch.plan.estimate import Plan, estimate
from tplaunch.plan.run import RunPlan, plan_facts, plan_run
from tplaunch.plan.schedule import StageCost, predict
from tplaunch.plan.tune import schedule_seconds
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.shipped import shipped_recipes
from tplaunch.spec.flops import model_flops_per_token
from tplaunch.spec.gpu import find_gpu

H100 = find_gpu("h100-80gb")
STAGED = """\
extends: {base}
name: staged
training:
  seq_len: 4096
  global_batch_size: 64
  recompute: cheap
  steps: 1000
  stages:
    - {{name: short, until: 100 steps}}
    - {{name: large, until: 70%, global_batch_size: 128}}
    - {{name: long, last: 200 steps, seq_len: 32768, global_batch_size: 32, topology: {{tp: 4, cp: 2, dp: 1}}}}
    - {{lr: {{kind: linear, to: 0}}}}
lr_schedule: {{warmup_steps: 10, decay: constant}}
checkpoint: {{every: 50, keep: 2, keep_every: 300 steps}}
"""


def checked(name: str | Path, *overrides: str) -> Recipe:
    return check_recipe(load_recipe(name, overrides), need_data=False).recipe


def planned(name: str | Path, *overrides: str) -> RunPlan:
    return plan_run(checked(name, *overrides), H100)


def one(*overrides: str) -> Plan:
    return estimate(Case(checked("llama3-8b", "training.recompute=cheap", *overrides), H100))


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """llama3-8b in four stages on 8 GPUs."""
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED.format(base=shipped_recipes()["llama3-8b"]))
    return path


# Sums


def test_a_run_is_the_sum_of_its_stages(staged: Path) -> None:
    found = planned(staged)
    short, large, long, last = found.stages
    shapes = [
        one("training.seq_len=4096", "training.global_batch_size=64"),
        one("training.seq_len=4096", "training.global_batch_size=128"),
        *[one("training.seq_len=32768", "training.global_batch_size=32", "topology.tp=4", "topology.cp=2")] * 2,
    ]
    counts, batches = [100, 600, 200, 100], [64 * 4096, 128 * 4096, 32 * 32768, 32 * 32768]
    for stage, shape, count, batch in zip(found.stages, shapes, counts, batches, strict=True):
        assert len(stage.steps) == count and stage.tokens == count * batch
        assert stage.seconds == pytest.approx(count * shape.step_seconds)
        assert stage.flops == pytest.approx(count * batch * shape.model_flops_per_token)
        assert stage.plan.memory == shape.memory
    assert found.tokens == sum(count * batch for count, batch in zip(counts, batches, strict=True))
    assert found.seconds == pytest.approx(
        sum(count * shape.step_seconds for count, shape in zip(counts, shapes, strict=True))
    )
    assert found.gpu_hours == pytest.approx(found.seconds * 8 / 3600)
    assert found.energy_kwh == pytest.approx(found.gpu_hours * H100.power / 1000)
    assert large.flops > short.flops and long.plan.model_flops_per_token > large.plan.model_flops_per_token
    assert [stage.title for stage in (short, last)] == ["stage 1 (short)", "stage 4"]
    assert found.fullest is long, "the first of those that take as much"


def test_smaller_batches_take_the_time_of_their_own_steps() -> None:
    """Not that of as many tokens in full batches, which keep a pipeline busier."""
    pipeline = ("topology.nodes=8", "topology.pp=2", "topology.tp=4", "topology.dp=8")
    sizes = "training.batch_schedule=[{size: 16, for: 100}, {size: 64, for: 50}]"
    found = planned("llama3-8b", *pipeline, sizes, "training.steps=1000")
    each = {
        size: estimate(Case(checked("llama3-8b", *pipeline, f"training.global_batch_size={size}"), H100)).step_seconds
        for size in (16, 64, 128)
    }
    assert found.seconds == pytest.approx(100 * each[16] + 50 * each[64] + 850 * each[128])
    assert found.tokens == (100 * 16 + 50 * 64 + 850 * 128) * 8192
    assert found.seconds > 1.001 * each[128] * found.tokens / (128 * 8192)


def test_of_many_batch_sizes_those_between_are_interpolated() -> None:
    ramp = "training.batch_ramp_up={start: 4096, increment: 1024, steps: 100, over: null}"
    run_ = planned("deepseek-v3", "hardware.gpu=h100-80gb", ramp, "training.stages=null")
    course, plan = run_.course, run_.stages[0].plan
    exact = 0.0
    for block in course.batches.blocks:
        steps = 100 if block.size < 15360 else course.steps - block.step
        changed = plan.case.recipe.training.model_copy(update={"global_batch_size": block.size})
        exact += steps * estimate(Case(plan.case.recipe.model_copy(update={"training": changed}), H100)).step_seconds
    assert len(course.batches.blocks) == 12
    assert run_.seconds == pytest.approx(exact, rel=2e-3)


def test_flops_follow_the_length_of_samples() -> None:
    """6 N D and attention, which grows with the length: by hand for the first and the last stage."""
    found = planned("llama3-405b")
    model = found.recipe.model
    for stage, seq_len in ((found.stages[0], 4096), (found.stages[-2], 131_072)):
        assert stage.plan.model_flops_per_token == model_flops_per_token(model, seq_len)
    assert found.total_flops == pytest.approx(
        sum(
            model_flops_per_token(model, stage.plan.case.recipe.training.seq_len) * stage.tokens
            for stage in found.stages
        )
    )


def test_checkpoints_that_stay(staged: Path) -> None:
    """Every 50 of 1,000 steps: 950 and 1,000, and 300, 600, 900 for ever; of 14 bytes a parameter less 2: 4 of each
    weight and of its two moments."""
    kept = planned(staged).checkpoints
    assert (kept.count, kept.each) == (5, 12 * 8_030_261_248)
    assert kept.bytes == 5 * kept.each
    best = ("checkpoint.keep_best=validation/loss", "training.eval_every=50")
    assert planned(staged, *best).checkpoints.count == 6
    assert planned(staged, "checkpoint.keep=30").checkpoints.count == 20, "no more than there are"
    ends = planned(staged, "checkpoint.every=0", "checkpoint.keep=9", "checkpoint.keep_every=null").checkpoints
    assert ends.count == 2, "of the workers of each topology"


def test_the_plan_of_a_launch_says_the_whole_run_beside_the_step_in_force(staged: Path) -> None:
    recipe = checked(staged)
    facts, whole = plan_facts(recipe, H100), plan_run(recipe, H100)
    assert facts["seconds"] == whole.seconds and facts["step_seconds"] == whole.stages[0].plan.step_seconds
    assert [stage["name"] for stage in facts["stages"]] == ["short", "large", "long", ""]


# What is printed


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(["plan", *arguments])
    return code, capsys.readouterr().out


def test_the_stages_are_told_and_one_in_full(staged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = shown(capsys, str(staged))
    assert code == Exit.DONE
    lines = [plain(line) for line in out.splitlines()]
    table = next(number for number, line in enumerate(lines) if "until step" in line)
    rows = [line.split() for line in lines[table + 1 : table + 5]]
    assert rows[0][:8] == ["1", "short", "100", "26.21M", "4,096", "64", "8", "8/1/1/1"]
    assert rows[2][:8] == ["3", "long", "900", "550.50M", "32,768", "32", "8", "4/2/1/1"]
    assert all(len(line) <= 120 for line in lines[: table + 8])
    found = planned(staged)
    assert f"1,000 steps, {found.tokens / 1e6:.2f}M tokens" in out and f"{found.gpu_hours:,.0f} GPU-hours" in out
    assert "5 checkpoints of 89.75 GiB when the run has ended: 448.73 GiB" in out
    assert (
        "batch size: 64 x 4,096 until step 100 (26.21M tokens), 128 x 4,096 until step 700 (340.79M tokens), 32 x"
        in out
    )
    assert "Of all stages, stage 3 (long) takes the most memory:" in out
    assert "tp 4, cp 2 (allgather)" in out and "seq_len 32768" in out and "global batch 32" in out


def test_json_has_the_stages_and_adds_up(staged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = shown(capsys, str(staged), "--json")
    plan: dict[str, Any] = json.loads(out)
    stages = plan["stages"]
    assert code == Exit.DONE and plan["stage"] == 3 and plan["fits"]
    assert [(stage["stage"], stage["first_step"], stage["last_step"]) for stage in stages] == [
        (1, 1, 100),
        (2, 101, 700),
        (3, 701, 900),
        (4, 901, 1000),
    ]
    for key in ("tokens", "seconds", "gpu_hours", "energy_kwh", "total_flops", "steps"):
        assert plan[key] == pytest.approx(sum(stage[key] for stage in stages)), key
    assert stages[2]["topology"]["cp"] == 2 and stages[2]["seq_len"] == 32768
    assert plan["checkpoints"]["bytes"] == plan["checkpoints"]["kept"] * plan["checkpoints"]["bytes_each"]


def test_a_stage_that_does_not_fit_is_refused(staged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = shown(capsys, str(staged), "--set", "training.recompute=none", "--set", "training.micro_batch_size=4")
    assert code == Exit.USAGE
    lines = [plain(line) for line in out.splitlines()]
    table = next(number for number, line in enumerate(lines) if "until step" in line)
    fits = [line.split()[-1] for line in lines[table + 1 : table + 5]]
    assert fits[0] == "yes" and fits[2:] == ["no", "no"]
    assert "does not fit: " in out and "  fix: in stage 3 (long): " in out and "--set" not in out


def test_a_run_without_stages_has_no_table_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = shown(capsys, "llama3-8b")
    assert code == Exit.DONE and out.startswith("llama3-8b  8 x h100-80gb") and "until step" not in out.splitlines()[2]
    plan = json.loads(shown(capsys, "llama3-8b", "--json")[1])
    assert "stages" not in plan and "stage" not in plan
    assert plan["seconds"] == pytest.approx(20_000 * plan["step_seconds"])


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"llama3-70b-tp4"}))
def test_every_shipped_recipe_is_planned(name: str) -> None:
    recipe = checked(name)
    whole = plan_run(recipe, find_gpu(recipe.hardware.gpu or "h100-80gb"))
    assert whole.fits and whole.seconds > 0


# tune


def test_tune_adds_up_the_stages_that_have_the_first_topology(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", str(staged), "--gpus", "8", "--json"]) == Exit.DONE
    choices = json.loads(capsys.readouterr().out)["choices"]
    best = choices[0]
    assert best["stages"] == [1, 2] and best["tokens"] == (100 * 64 + 600 * 128) * 4096
    assert [choice["seconds"] for choice in choices] == sorted(choice["seconds"] for choice in choices)
    changes = [f"--set={setting}" for setting in _settings(best["set"])]
    run(["plan", str(staged), *changes, "--json"])  # the long stage does not fit, without recomputation
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert best["seconds"] == pytest.approx(stages[0]["seconds"] + stages[1]["seconds"])
    assert run(["tune", str(staged), "--gpus", "8"]) == Exit.DONE
    assert "For stage 2 (large), the longest of those with the first topology (1, 2)" in capsys.readouterr().out


def _settings(change: str) -> list[str]:
    """The keys and values of a change but for those of recomputation, of which none is nested here."""
    return [part for part in change.split(", ") if "=" in part]


@pytest.mark.parametrize("batch", [4, 8, 16])
def test_the_formula_of_interleaved_steps_holds_for_few_microbatches(batch: int) -> None:
    """2, 4 and 8 of them for 4 pipeline ranks of 8 stages each."""
    sizes = ("topology.tp=1", "topology.sequence_parallel=false", "topology.pp=4", "topology.virtual_stages=8")
    own = Case(
        checked("llama3-8b", *sizes, "topology.schedule=interleaved1f1b", f"training.global_batch_size={batch}"), H100
    )
    stage = StageCost(1 / 8, 1 / 8, 1 / 8)
    simulated = predict("interleaved1f1b", 4, 8, batch // 2, [stage] * 32).seconds
    sends = 2 * 3 * 8 * send_seconds(own, 0, 1)
    assert schedule_seconds(own, 1.0, 1.0, 1.0) - sends == pytest.approx(simulated)


def test_tune_needs_a_stage_to_tune(staged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "training.stages=[{topology: {tp: 8}}]"
    assert run(["tune", str(staged), "--gpus", "8", "--set", stages]) == Exit.USAGE
    assert "training.stages[0].topology: has a topology of its own" in capsys.readouterr().err
