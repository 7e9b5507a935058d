"""What a stage has from the one before: of the topology all but what followed from keys that it changes."""

from __future__ import annotations

from typing import Any

from tests.recipes import case
from tplaunch.check.recipe import check_recipe
from tplaunch.plan.run import batch_sizes
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course
from tplaunch.spec.run_stages import carried, shares


def staged(*stages: dict[str, Any], **topology: Any) -> Recipe:
    raw = case(training={"steps": 100, "stages": list(stages)})
    raw["topology"] = {**raw["topology"], **topology}
    return carried(Recipe.model_validate(raw))


def test_a_topology_that_fills_its_nodes_goes_on_filling_them() -> None:
    recipe = staged({"until": 50}, {"topology": {"tp": 2}}, dp="auto", nodes=2, gpus_per_node=4)
    assert recipe.training.stages is not None
    second = recipe.training.stages[1].topology
    assert second is not None and (second.tp, second.dp, second.gpus_per_node) == (2, "auto", 4)
    recipe = staged({"until": 50}, {"topology": {"tp": 2}}, dp=8, nodes=2, gpus_per_node=4)
    assert recipe.training.stages is not None and recipe.training.stages[1].topology is not None
    assert recipe.training.stages[1].topology.gpus_per_node is None, "of 16 ranks on 2 nodes it is another"


def test_layers_are_split_anew_where_the_pipeline_changes() -> None:
    own = {"pp": 2, "stage_layers": [1, 3]}
    recipe = staged({"until": 40}, {"until": 60, "topology": {"tp": 2}}, {"topology": {"pp": 1}}, **own)
    assert recipe.training.stages is not None
    layers = [stage.topology.stage_layers for stage in recipe.training.stages if stage.topology is not None]
    assert layers == [[1, 3], [1, 3], None]


def test_all_stages_of_a_run_fill_its_gpus() -> None:
    recipe = check_recipe(load_recipe("llama3-405b"), need_data=False).recipe
    stages = recipe.training.stages or []
    ranks = [stage.topology.tp * stage.topology.cp * stage.topology.pp * stage.topology.dp for stage in stages]  # type: ignore[union-attr, operator]
    assert ranks == [16_384] * 8


def test_steps_of_each_batch_size_of_a_stage() -> None:
    raw = case(training={"steps": 100, "stages": [{"until": 30}, {"until": 60}, {"global_batch_size": 4}]})
    raw["training"]["batch_schedule"] = [{"size": 2, "for": 10}, {"size": 4, "for": 35}]
    course = Course(Recipe.model_validate(raw))
    assert [batch_sizes(course, number) for number in range(3)] == [{2: 10, 4: 20}, {4: 15, 8: 15}, {4: 40}]


def test_shares_of_corpora_by_stage() -> None:
    mixed = {"data": {"train": [{"path": "a", "weight": 1e308}, {"path": "b", "weight": 1e308}]}}
    recipe = staged({"until": 50}, mixed)
    assert [shares(recipe, number) for number in range(2)] == [{("unused", 0): 1.0}, {("a", 0): 0.5, ("b", 0): 0.5}]
