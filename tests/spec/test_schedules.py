"""The table of schedules, and what stands in a resolved recipe."""

from __future__ import annotations

from typing import get_args

import pytest

from tests.recipes import case, resolved
from tplaunch.recipe.schema import Recipe, Schedule
from tplaunch.spec.resolve import resolve
from tplaunch.spec.schedules import SCHEDULES
from tplaunch.spec.stages import layer_costs, stage_ranges
from tplaunch.spec.topology import Topology


def test_the_table_has_every_schedule_that_a_recipe_can_name() -> None:
    assert tuple(SCHEDULES) == get_args(Schedule)


def test_why_a_schedule_cannot_run() -> None:
    assert SCHEDULES["1f1b"].why_not(4, 1, 4) == ""
    assert "at least pp = 4 microbatches, not 3" in SCHEDULES["1f1b"].why_not(4, 1, 3)
    assert "runs 1 stage" in SCHEDULES["1f1b"].why_not(4, 2, 8)
    assert "exactly 2 stages" in SCHEDULES["zbvzerobubble"].why_not(4, 3, 8)
    assert "2 x pp = 8" in SCHEDULES["dualpipev"].why_not(4, 2, 7)
    assert "equal rounds" in SCHEDULES["interleaved1f1b"].why_not(4, 2, 9)


def test_a_recipe_is_resolved_once_and_for_all() -> None:
    recipe = resolved(case(2, 2, 2))
    assert recipe.topology.gpus_per_node == 8
    assert recipe.topology.stage_layers is not None and sum(recipe.topology.stage_layers) == 4
    assert resolve(recipe) is recipe
    assert resolve(Recipe.model_validate(recipe.model_dump(by_alias=True))) == recipe


def test_nodes_of_a_recipe_that_states_no_size_are_equal_parts_of_the_world() -> None:
    recipe = Recipe.model_validate(case(2, 1, 4, nodes=2))
    assert (Topology.of(recipe).ranks_per_node, Topology.of(recipe).nodes) == (4, 2)


def test_what_is_not_resolved_is_refused() -> None:
    raw = case()
    raw["topology"]["dp"] = "auto"
    with pytest.raises(ValueError, match="dp is auto"):
        Topology.of(Recipe.model_validate(raw))
    with pytest.raises(ValueError, match="stage_layers is not known"):
        stage_ranges(Recipe.model_validate(case(1, 2)))


def test_a_block_that_is_recomputed_every_so_often_costs_so_much_more() -> None:
    def ends(recompute: object) -> tuple[float, float]:
        return layer_costs(Recipe.model_validate(case(1, 2, training={"recompute": recompute})))[:2]

    none, half, full = ends("none")[1], ends({"every": 2})[1], ends("full")[1]
    forward = 2 * 64 * (4 * 16 * 2 + 2 * 16 * 2 + 3 * 96) + 4 * 4 * 16 * 32 / 2
    again = 1 - 2 * 64 * 96 / forward  # all but the MLP's last projection, which no gradient needs
    assert none / half == pytest.approx(1 + again / 2 / 3) and none / full == pytest.approx(1 + again / 3)
    assert ends("cheap")[1] == none
    core = ends({"again": ["core_attention"]})[1]
    assert none / core == pytest.approx(1 + 4 * 4 * 16 * 32 / 2 / forward / 3)
