"""`training.recompute: auto`, what parts save and cost, and the search for the cheapest that fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.plan.test_plan import case
from tests.recipes import work_in
from tplaunch.cli.main import run
from tplaunch.plan.activations import block_activations
from tplaunch.plan.case import Case
from tplaunch.plan.change import Change
from tplaunch.plan.estimate import block_work, estimate
from tplaunch.plan.recomputation import HEADROOM, Option, cheapest, cheapest_change, options, part_costs
from tplaunch.plan.remedies import remedies
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Part, Recompute
from tplaunch.spec.recompute import PARTS, chosen, effective, kept

LARGE = ["llama3-8b", "llama3-405b", "gpt3-175b", "qwen3-8b"]


def with_recompute(own: Case, value: Any) -> Case:
    changed = Change({"training.recompute": value}).apply(own)
    assert changed is not None
    return changed


def with_memory(own: Case, share: float) -> Case:
    """The case on a GPU with so much of the memory that it takes with nothing made again."""
    plan = estimate(with_recompute(own, "none"))
    needed = plan.memory[plan.fullest].total
    return replace(own, gpu=replace(own.gpu, memory=int(share * needed)))


@pytest.mark.parametrize("name", LARGE)
def test_options_are_all_sets_that_no_other_beats(name: str) -> None:
    own = case(name)
    work, found = block_work(own), options(own)
    assert [option.seconds for option in found] == sorted(option.seconds for option in found)
    assert all(after.kept < before.kept for before, after in pairwise(found))
    assert (found[0].value, found[0].seconds, found[0].kept) == ("none", 0.0, block_activations(own))
    assert found[-1].value == "full"
    every: list[frozenset[Part]] = [frozenset(c) for n in range(9) for c in combinations(PARTS, n)]
    for parts in every:
        seconds, keeps = work.again(kept(own.model, parts).made), block_activations(own, parts)
        beaten = any(o.seconds <= seconds * (1 + 1e-9) and o.kept <= keeps * (1 + 1e-9) for o in found)
        assert beaten, f"{sorted(parts)} is not among the options"
    for option in found:
        parts = effective(own.model, chosen(with_recompute(own, option.value).recipe.training, 0))
        assert block_activations(own, parts) == option.kept


@pytest.mark.parametrize("share", [1.2, 0.95, 0.85, 0.75, 0.65])
@pytest.mark.parametrize("name", LARGE)
def test_auto_is_the_cheapest_of_all_that_fit(name: str, share: float) -> None:
    own = with_memory(case(name), share)
    spare = HEADROOM * own.gpu.memory
    fitting = [o for o in options(own) if estimate(with_recompute(own, o.value)).headroom >= spare]
    change = cheapest_change(own)
    if not fitting:
        assert change is None
    else:
        assert change is not None
        assert change.values == {"training.recompute": fitting[0].value}


def test_the_search_goes_back_where_memory_does_not_fall_steadily() -> None:
    found = [Option(str(n), float(n), float(-n)) for n in range(9)]
    asked: list[str] = []

    def fits(option: Option) -> bool:
        asked.append(str(option.value))
        return option.value in ("3", "4", "6", "7", "8")

    best = cheapest(found, fits)
    assert best is not None
    assert best.value == "3"
    assert len(asked) <= 7
    assert cheapest(found, lambda option: False) is None
    assert cheapest(found, lambda option: True) is found[0]


@pytest.mark.parametrize("name", LARGE)
def test_parts_save_and_cost_what_plans_with_them_say(name: str) -> None:
    own = with_recompute(case(name), "none")
    plan = estimate(own)
    costs = part_costs(plan)
    told = {part for cost in costs for part in cost.parts}
    assert told == set(PARTS) - {"down", "dispatch"} - (set() if own.model.position == "rope" else {"rotary"})
    for cost in costs:
        then = with_recompute(own, Recompute(again=list(cost.parts)))
        then = replace(then, recipe=then.recipe.model_copy(update={"topology": own.recipe.topology}))  # the same split
        other = estimate(then)
        saved = plan.memory[plan.fullest].activations - other.memory[plan.fullest].activations
        assert cost.rank_bytes == pytest.approx(saved, rel=0.1)
        assert cost.block_bytes == block_activations(own) - block_activations(own, frozenset(cost.parts))
        assert other.breakdown.recompute == pytest.approx(cost.seconds, rel=0.2)  # of another rank, where splits differ


def test_plan_tells_parts_and_decides_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama3-8b", "--set", "training.recompute=auto", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recompute_parts"][0]["parts"] == ["norm"]
    assert all(cost["rank_bytes"] > 0 and cost["seconds"] > 0 for cost in plan["recompute_parts"])
    assert plan["headroom_bytes"] >= HEADROOM * plan["memory_bytes"]
    assert run(["plan", "llama3-8b", "--set", "training.recompute=cheap"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^norm +[\d.]+ MiB +[\d.]+ [MG]iB +[\d.]+ ms +made again$", out, re.MULTILINE)
    assert re.search(r"^gate_up .* kept$", out, re.MULTILINE)


def test_what_does_not_fit_names_the_cheapest_recomputation_that_does() -> None:
    own = with_recompute(with_memory(case("llama3-405b"), 0.8), "none")
    plan, change = estimate(own), cheapest_change(own)
    assert not plan.fits
    assert change is not None
    assert change.values in [remedy.change.values for remedy in remedies(plan)]


RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 2, num_heads: 4, ffn_hidden_size: 64, vocab_size: 300}
topology: {tp: 1, pp: 1, dp: 1}
training: {seq_len: 16, micro_batch_size: 1, global_batch_size: 2, steps: 1, precision: fp32, recompute: auto}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""


def test_a_run_keeps_what_auto_has_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work_in(tmp_path, monkeypatch, RECIPE)
    assert run(["train", "tiny.yaml"]) == 0  # on a CPU nothing is made again
    assert load_recipe(folder / "runs/tiny/recipe.yaml").recipe.training.recompute == "none"


def test_a_job_is_decided_for_the_gpu_that_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work_in(tmp_path, monkeypatch, RECIPE)
    assert run(["submit", "tiny.yaml", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"tiny\.yaml:5:\d+: training\.recompute: is auto\n.*not named\n.*hardware\.gpu", told)
    assert run(["submit", "tiny.yaml", "--dry-run", "--set", "hardware.gpu=h100-80gb"]) == 0
