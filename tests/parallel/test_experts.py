"""The way of tokens through experts on several ranks: what each expert gets, what comes back, and the gradients."""

from __future__ import annotations

import pytest
import torch

from tests.recipes import case, resolved
from tests.world import World

T, K, E, H = 7, 2, 8, 3


def _chosen(kind: str, rank: int) -> torch.Tensor:
    """Experts of this rank's tokens, [T, K]."""
    random = torch.Generator().manual_seed(rank)
    if kind == "one expert gets all":
        return torch.stack([torch.full((T,), 5), torch.full((T,), 6)], 1)
    if kind == "a rank gets none":
        return torch.rand(T, E // 2, generator=random).topk(K).indices
    return torch.rand(T, E, generator=random).topk(K).indices


def _way(kind: str, ep: int, expert_tp: int) -> list[torch.Tensor]:
    """Rows are multiplied by 1 + the number of their expert, in parts by the ranks that share it; with what follows on
    one rank without any exchange."""
    import torch.distributed as dist

    from tplaunch.parallel.experts import (
        begin_combine,
        begin_dispatch,
        dispatch_again,
        end_combine,
        end_dispatch,
        make_routes,
    )
    from tplaunch.parallel.mesh import Mesh

    moe = {"experts": E, "top_k": K, "ffn_hidden_size": 8}
    world = dist.get_world_size()
    mesh = Mesh.of(resolved(case(dp=world, ep=ep, expert_tp=expert_tp, model={"moe": moe})), torch.device("cpu"))
    ranks = mesh.experts
    assert ranks is not None
    chosen = _chosen(kind, dist.get_rank())
    random = torch.Generator().manual_seed(10 + dist.get_rank())
    x = torch.randn(T, H, generator=random, dtype=torch.float64).requires_grad_()
    weights = torch.rand(T, K, generator=random, dtype=torch.float64).requires_grad_()
    routes = make_routes(chosen, E, ranks)
    rows, row_weights = end_dispatch(begin_dispatch(x, weights, routes))
    assert torch.equal(rows, dispatch_again(x.detach(), routes))
    assert sum(routes.groups.sizes) == len(rows) == len(row_weights)
    factor = (1 + routes.groups.numbers() + ranks.ep.rank * (E // ep)).double() / expert_tp
    out = end_combine(begin_combine(rows * (row_weights * factor).unsqueeze(-1), routes))
    alone_x, alone_weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    expected = alone_x * (alone_weights * (1 + chosen)).sum(-1, keepdim=True)
    upstream = torch.randn(T, H, generator=random, dtype=torch.float64)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert torch.equal(routes.counts, torch.bincount(chosen.flatten(), minlength=E))
    pairs = [(out, expected), (x.grad, alone_x.grad), (weights.grad, alone_weights.grad)]
    return [(a - b).detach().abs().max() for a, b in pairs if a is not None and b is not None]


@pytest.mark.parametrize("kind", ["any", "one expert gets all", "a rank gets none"])
@pytest.mark.parametrize(("world_size", "ep", "expert_tp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2), (4, 4, 1)])
def test_every_row_meets_its_expert(world: World, kind: str, world_size: int, ep: int, expert_tp: int) -> None:
    for differences in world.run(world_size, _way, kind, ep, expert_tp):
        assert len(differences) == 3 and max(differences) < 1e-12
