"""Schedules that split the backward pass in two do its work once: matmuls counted in the real trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import products
from tests.recipes import SEQ, case, resolved
from tests.world import World
from tplaunch.parallel.split_backward import wanted

OTHERS = ("interleavedzerobubble", "dualpipev")
TP, MICROBATCHES, BATCH, HIDDEN, PADDED_VOCAB = 2, 4, 2, 64, 384


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += products.flops(func, args)
        return func(*args, **(kwargs or {}))


def flops(raw: dict[str, Any]) -> int:
    """Of one step's forward and backward passes, on this rank."""
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import random_batch
    from tplaunch.train.step import make_pipeline

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    pipeline = make_pipeline(build_stages(recipe, mesh), mesh, recipe)
    with Flops() as counted:
        pipeline.train(random_batch(recipe, mesh.topology.dp, pipeline.reads_data), 1.0)
    return counted.count


@pytest.mark.parametrize("schedule", ["zbvzerobubble", *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)])
@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_matmul_is_done_twice(world: World, schedule: str, sequence_parallel: bool) -> None:
    whole, split = (
        sum(world.run(2 * TP, flops, case(TP, 2, schedule=name, sequence_parallel=sequence_parallel)))
        for name in ("interleaved1f1b", schedule)
    )
    # But for the logits, which each half computes again, where a whole pass makes its gradients in the forward pass.
    logits = 2 * SEQ * BATCH * HIDDEN * PADDED_VOCAB * MICROBATCHES
    assert whole <= split <= whole + 2 * logits


def test_no_matmul_of_experts_is_done_twice(world: World) -> None:
    moe = {"experts": 4, "top_k": 2, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 32}
    whole, split = (
        sum(world.run(4, flops, case(1, 2, 2, ep=2, schedule=name, model={"moe": moe})))
        for name in ("interleaved1f1b", "zbvzerobubble")
    )
    logits = 2 * SEQ * BATCH * HIDDEN * PADDED_VOCAB * MICROBATCHES
    assert whole <= split <= whole + 2 * logits


def test_a_pass_tells_what_it_is_for() -> None:
    seen: list[list[bool]] = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            seen.append(wanted(ctx, 0, 2))
            x, weight = ctx.saved_tensors
            return grad * weight, None, grad * x

    x, weight = (torch.ones(2, requires_grad=True) for _ in range(2))
    y = Product.apply(x * 1, "y", weight * 1).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, weight, retain_graph=True)
    y.backward(retain_graph=True)
    z = Product.apply(x * 1, "z", torch.ones(2)).sum()
    z.backward()
    assert seen == [[True, False], [False, True], [True, True], [True, False]]
