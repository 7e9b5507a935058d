"""What a block with experts keeps and makes again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, resolved
from tplaunch.recipe.schema import Model
from tplaunch.spec.recompute import ALL, CHEAP, block_steps, effective, kept


def model(**moe: Any) -> Model:
    sizes = {"experts": 4, "top_k": 2, "ffn_hidden_size": 16, **moe}
    return resolved(case(model={"moe": sizes})).model


def test_the_router_chooses_once() -> None:
    """What it keeps is kept, whatever is made again."""
    for parts in (ALL, CHEAP, frozenset[Any]()):
        assert "routing" in kept(model(), parts, experts=True).kept


def test_with_all_made_again_rows_are_not_kept() -> None:
    found = kept(model(), ALL, experts=True)
    assert found.kept == {"input", "routing"}
    assert [step.part for step in found.made if "dispatched" in step.gives] == ["dispatch"]


def test_what_is_cheap_talks_to_nobody() -> None:
    assert "dispatched" in kept(model(), CHEAP, experts=True).kept


@pytest.mark.parametrize("experts", [False, True])
def test_a_part_that_is_not_there_saves_nothing(experts: bool) -> None:
    assert ("dispatch" in effective(model(), ALL, experts=experts)) == experts
    assert "down" not in effective(model(), ALL, experts=experts)


def test_shared_experts_are_made_again_with_the_others() -> None:
    shared = model(shared_ffn_hidden_size=16)
    (gate_up,) = (step for step in block_steps(shared, experts=True) if step.part == "gate_up")
    assert gate_up.gives == ("inside", "shared_inside") and gate_up.reads == ("dispatched", "middle_normed")
    assert "shared_inside" not in kept(shared, frozenset({"gate_up"}), experts=True).kept
