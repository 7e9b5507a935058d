"""Muon's update, on whatever ranks the matrices lie: that of the papers, matrix by matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.muon import PlainMuon, newton_schulz
from tests.world import World
from tplaunch.optim.muon import HeldMatrix, Muon, orthogonalize
from tplaunch.recipe.schema import Parallelism
from tplaunch.spec.muon import matrix_shape, rounds, scale
from tplaunch.spec.parameters import Parameter
from tplaunch.spec.slices import Rectangle, kept
from tplaunch.spec.topology import Topology

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = [(8, 8), (6, 20), (20, 6), (1, 7), (33, 32)]
# Hidden matrices cut by columns, by rows, not at all, key/value heads that two tp ranks hold, three experts a rank.
PARAMETERS = [
    Parameter("q", (24, 16), 0, 0, "matrix", 4),
    Parameter("k", (8, 16), 0, 0, "matrix", 2),
    Parameter("o", (16, 24), 0, 1, "matrix", 4),
    Parameter("a", (5, 16), 0, None, "matrix"),
    Parameter("up", (48, 16), 0, 0, "matrix", 48),
    Parameter("gate", (6 * 16, 8), 0, None, "expert", 6, 0, 1),
    Parameter("down", (6 * 16, 8), 0, None, "expert", 6, 0, 1),
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp4": {"tp": 4, "expert_tp": 2, "ep": 2},
    "dp4-zero0": {"dp": 4, "zero": 0, "ep": 2},
    "dp4-zero1": {"dp": 4, "ep": 2},
    "dp4-hsdp": {"dp": 4, "dp_replicate": 2, "zero": 2},
    "tp2-cp2-dp2": {"tp": 2, "cp": 2, "dp": 2, "ep": 2, "expert_tp": 2},
    "tp2-dp3-ep3": {"tp": 2, "dp": 3, "ep": 3, "expert_tp": 2},
    "tp4-dp2-zero0": {"tp": 4, "dp": 2, "zero": 0, "ep": 2},
}
STEPS, LR, DECAY, MOMENTUM = 3, 0.1, 0.5, 0.8


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    many = torch.stack([matrix(*shape, seed=seed) for seed in range(3)])
    ours = orthogonalize(many)
    for one, made in zip(many, ours, strict=True):
        torch.testing.assert_close(made, newton_schulz(one), rtol=1e-11, atol=1e-11)
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5 and values.max() < 1.5, "singular values are not near 1"
    assert not orthogonalize(torch.zeros(1, 3, 4)).any(), "no gradient, no update"


def test_it_is_that_of_torch_in_bf16() -> None:
    """torch.optim.Muon always orthogonalises in bf16; it agrees to what bf16 holds."""
    theirs = [torch.nn.Parameter(matrix(*shape, seed=n).float()) for n, shape in enumerate(SHAPES)]
    optimizer = torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    parameters = [Parameter(str(n), shape, 0, None, "matrix") for n, shape in enumerate(SHAPES)]
    ours = make(parameters, [weight.detach().clone() for weight in theirs], Topology(), Parallelism(), torch.bfloat16)
    for step in range(STEPS):
        for n, (weight, held) in enumerate(zip(theirs, ours._held, strict=True)):
            weight.grad = matrix(*weight.shape, seed=100 * step + n).float()
            held.weight.grad = weight.grad.clone()
        optimizer.step()
        ours.step()
        for weight, held in zip(theirs, ours._held, strict=True):
            largest = 0.05 * LR * scale(*weight.shape)  # of an update, whose elements are far below 1
            torch.testing.assert_close(held.weight, weight, rtol=0, atol=largest)
            torch.testing.assert_close(
                ours.state[held.weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"]
            )


def make(
    parameters: list[Parameter], slices: list[Tensor], topology: Topology, layout: Parallelism, dtype: torch.dtype
) -> Muon:
    """Muon over this rank's slices of some parameters."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    held = [
        HeldMatrix(torch.nn.Parameter(data), kept(parameter, topology, layout, rank), matrix_shape(parameter))
        for parameter, data in zip(parameters, slices, strict=True)
    ]
    return Muon(
        [{"params": [each.weight for each in held if each.weight.numel()], "lr": LR, "weight_decay": DECAY}],
        momentum=MOMENTUM,
        held=held,
        rounds=rounds(parameters, topology, layout),
        rank=rank,
        group=dist.group.WORLD if dist.is_initialized() else None,
        dtype=dtype,
    )


def cut(whole: Tensor, place: Rectangle) -> Tensor:
    rows, columns = place
    return whole[rows.start : rows.stop, columns.start : columns.stop].clone()


def update(layout: dict[str, Any], few: bool) -> list[tuple[Rectangle, Tensor]]:
    """This rank's place in each parameter, and its weights after some steps."""
    import tplaunch.spec.muon as spec

    if few:
        spec.ROUND = 100  # elements: several rounds
    recipe = Parallelism(**layout)
    sizes = {name: layout.get(name, 1) for name in ("tp", "cp", "dp", "ep", "expert_tp")}
    topology = Topology(**sizes)
    import torch.distributed as dist

    places = [kept(parameter, topology, recipe, dist.get_rank()) for parameter in PARAMETERS]
    weights = [
        cut(matrix(*p.shape, seed=n), place) for n, (p, place) in enumerate(zip(PARAMETERS, places, strict=True))
    ]
    muon = make(PARAMETERS, weights, topology, recipe, torch.float64)
    assert len(muon._rounds) > 1 or not few
    for step in range(STEPS):
        for n, (parameter, held) in enumerate(zip(PARAMETERS, muon._held, strict=True)):
            held.weight.grad = cut(matrix(*parameter.shape, seed=100 * (step + 1) + n), held.place)
        muon.step()
    return [(held.place, held.weight.detach()) for held in muon._held]


def expected() -> list[Tensor]:
    """The weights by the reference: each matrix, and each expert's, by itself."""
    wholes = [matrix(*p.shape, seed=n) for n, p in enumerate(PARAMETERS)]
    parts = [list(whole.split(matrix_shape(p)[0])) for whole, p in zip(wholes, PARAMETERS, strict=True)]
    plain = PlainMuon([part for each in parts for part in each], LR, DECAY, MOMENTUM)
    for step in range(STEPS):
        for n, (parameter, each) in enumerate(zip(PARAMETERS, parts, strict=True)):
            gradient = matrix(*parameter.shape, seed=100 * (step + 1) + n)
            for part, piece in zip(each, gradient.split(matrix_shape(parameter)[0]), strict=True):
                part.grad = piece.clone()
        plain.step()
    return [torch.cat(each) for each in parts]


@pytest.mark.parametrize("few", [False, True], ids=["one round", "many rounds"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_updates_are_those_of_whole_matrices(world: World, name: str, few: bool) -> None:
    layout = LAYOUTS[name]
    size = layout.get("tp", 1) * layout.get("cp", 1) * layout.get("dp", 1)
    wholes, covered = expected(), [torch.zeros(p.shape) for p in PARAMETERS]
    for rank in world.run(size, update, layout, few):
        for whole, seen, (place, weight) in zip(wholes, covered, rank, strict=True):
            torch.testing.assert_close(weight, cut(whole, place), rtol=1e-11, atol=1e-11)
            seen[place.rows.start : place.rows.stop, place.columns.start : place.columns.stop] += 1
    assert all(seen.min() >= 1 for seen in covered), "no rank has it"


def test_work_is_spread_over_the_ranks() -> None:
    """Of a whole model's matrices no rank orthogonalises much more than its share, nor an expert's that it has no part
    of."""
    layers = [
        Parameter(f"{layer}.{name}", shape, layer, dim, "matrix", 32)
        for layer in range(8)
        for name, shape, dim in (("q", (64, 64), 0), ("k", (32, 64), 0), ("o", (64, 64), 1), ("up", (192, 64), 0))
    ]
    experts = [Parameter(f"{layer}.gate", (16 * 64, 32), layer, None, "expert", 16, 0, 1) for layer in range(8)]
    topology, layout = Topology(tp=4, dp=4, ep=8), Parallelism(tp=4, dp=4, ep=8)
    for parameters in (layers, experts):
        loads = [0.0] * 16
        found = rounds(parameters, topology, layout)
        for each in found:
            for one, owner, holders in zip(each.matrices, each.owners, each.holders, strict=True):
                loads[owner] += one.flops
                assert owner in holders
        assert max(loads) < 1.3 * sum(loads) / 16
    assert {len(holders) for each in found for holders in each.holders} <= {1, 2}


def test_rounding_grows_no_more_than_the_slope_at_zero() -> None:
    """What fp32 leaves open of a matrix, Newton-Schulz makes 3.4445^5 = 485 times as large at most, where the matrix
    has no singular value: the tolerance of fp32 runs follows from it."""
    thin = matrix(64, 4, seed=1) @ matrix(4, 64, seed=2)  # 60 singular values are zero
    thin /= thin.norm()
    error = 1e-7 * matrix(64, 64, seed=3) / 64
    moved = (orthogonalize((thin + error)[None]) - orthogonalize(thin[None])).norm() / error.norm()
    assert 300 < moved < 490
    full = matrix(64, 64, seed=4)
    full /= full.norm()
    assert (orthogonalize((full + error)[None]) - orthogonalize(full[None])).norm() / error.norm() < 300
