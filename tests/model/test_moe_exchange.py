"""The collectives of a layer with experts: counted in the trainer's layer, and as `spec.experts` tells them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.recipes import BATCH, SEQ, case, ranks, resolved
from tests.world import World
from tplaunch.spec.experts import exchanges

KINDS = {
    "all_to_all_single": "all-to-all",
    "all_gather_into_tensor": "all-gather",
    "all_reduce": "all-reduce",
}
MOE = {"experts": 8, "top_k": 2, "ffn_hidden_size": 16}


class Collectives(TorchDispatchMode):
    """Calls and bytes of each kind of collective of each group."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "_c10d_functional" and name in KINDS:
            key = KINDS[name], args[-1]
            told = result if name == "all_gather_into_tensor" else args[0]
            self.calls[key] += 1
            self.bytes[key] += told.numel() * told.element_size()
        return result


def counted(raw: dict[str, Any], again: bool) -> list[dict[tuple[str, str], tuple[int, int]]]:
    """Calls and bytes of a layer's forward and its backward pass, by kind and axis."""
    from tplaunch.model.moe import MoE
    from tplaunch.model.recompute import Recomputation, run_once
    from tplaunch.parallel.mesh import Mesh

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    assert mesh.experts is not None
    groups = {"tp": mesh.tp, "cp": mesh.cp, "ep": mesh.experts.ep, "expert_tp": mesh.experts.tp}
    axes = {ranks.group.group_name: axis for axis, ranks in groups.items() if ranks is not None and ranks.size > 1}
    moe = MoE(recipe.model, mesh)
    for number, parameter in enumerate(moe.parameters()):
        torch.nn.init.normal_(parameter.to_local(), generator=torch.Generator().manual_seed(number))  # type: ignore[attr-defined]
    length = SEQ // mesh.topology.cp // (mesh.tp.size if mesh.tp.sequence_parallel else 1)
    x = torch.randn(length, recipe.training.micro_batch_size, recipe.model.hidden_size).requires_grad_()
    with Collectives() as forward:
        if again:
            with Recomputation({"dispatch"}) as run:
                out = moe(run, x)
        else:
            out = moe(run_once, x)
    with Collectives() as backward:
        out.sum().backward()
    return [
        {(kind, axes[group]): (each.calls[kind, group], each.bytes[kind, group]) for kind, group in each.calls}
        for each in (forward, backward)
    ]


CASES = {
    "alone": case(model={"moe": MOE}),
    "ep2": case(dp=2, ep=2, model={"moe": MOE}),
    "ep4-aux-tp2": case(2, dp=2, ep=4, model={"moe": {**MOE, "aux_loss": 0.1}}),
    "sp-expert-tp2": case(2, sequence_parallel=True, expert_tp=2, model={"moe": MOE}),
    "all": case(2, 1, 1, cp=2, ep=2, expert_tp=2, model={"moe": {**MOE, "aux_loss": 0.1}}),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_collectives_are_those_told(world: World, name: str, again: bool) -> None:
    raw = CASES[name]
    topology, moe = raw["topology"], raw["model"]["moe"]
    tp, cp, dp = topology["tp"], topology.get("cp", 1), topology["dp"]
    told = exchanges(
        tokens=SEQ // cp // tp * raw["training"]["micro_batch_size"],
        sequences=raw["training"]["micro_batch_size"],
        hidden=raw["model"]["hidden_size"],
        experts=moe["experts"],
        top_k=moe["top_k"],
        ep=topology.get("ep", 1),
        expert_tp=topology.get("expert_tp", 1),
        tp=tp,
        cp=cp,
        sequence_parallel=topology.get("sequence_parallel", False),
        counts_sequences="aux_loss" in moe,
        element=4,
    )
    size = ranks(raw)
    assert size == tp * cp * dp and raw["training"]["global_batch_size"] == BATCH
    expected: list[dict[tuple[str, str], tuple[int, float]]] = []
    for calls in (lambda each: each.forward, lambda each: each.backward + (each.again if again else 0)):
        found: dict[tuple[str, str], tuple[int, float]] = {}
        for each in told:
            if number := calls(each):
                before = found.get((each.kind, each.axis), (0, 0.0))
                found[each.kind, each.axis] = before[0] + number, before[1] + number * each.bytes
        expected.append(found)
    results = world.run(size, counted, raw, again)
    for place, direction in enumerate(expected):
        of_ranks = [result[place] for result in results]
        for rank in of_ranks:
            assert {key: each[0] for key, each in rank.items()} == {key: each[0] for key, each in direction.items()}
        for key, (_, size_told) in direction.items():  # uneven: of all ranks together they are what is told
            assert sum(rank[key][1] for rank in of_ranks) == size_told * size, key
