"""What a report says in words beside its pictures."""

from __future__ import annotations

from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Model
from tplaunch.report.drawings import in_words
from tplaunch.spec.topology import Topology


def words(topology: Topology, preset: str) -> str:
    return in_words(topology, Model.model_validate(PRESETS[preset])).replace("\u00d7", "x")


def test_a_topology_in_words() -> None:
    dense = words(Topology(tp=8, dp=2, gpus_per_node=8), "llama3-8b")
    assert dense == "16 ranks = TP 8 x DP 2 x PP 1, on 2 nodes; 8.03B parameters."
    spread = words(Topology(dp=16, ep=8, gpus_per_node=8), "mixtral-8x7b")
    assert spread == (
        "16 ranks = TP 1 x DP 16 x PP 1 (experts: EP 8 x EDP 2), on 2 nodes; 46.70B parameters, 12.88B of them active."
    )
