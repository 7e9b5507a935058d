"""Initial weights: the same numbers on every topology, and no number drawn that nobody keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.recipes import case, resolved
from tests.world import World
from tplaunch.model import init
from tplaunch.model.init import Slice, initialize
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Experts, Model
from tplaunch.spec.parameters import Parameter, block_parameters, first_parameters
from tplaunch.spec.slices import kept
from tplaunch.torch_private import FakeStore

MODEL = Model(hidden_size=64, num_layers=2, num_heads=4, ffn_hidden_size=96, vocab_size=300)
(EMBEDDING,) = first_parameters(MODEL)


MOE = Experts(experts=6, top_k=2, ffn_hidden_size=48, shared_ffn_hidden_size=32, bias_rate=0.001, biases=True)
MIXTURE = MODEL.model_copy(update={"moe": MOE})


def filled(start: tuple[int, ...], shape: tuple[int, ...], parameter: Parameter = EMBEDDING) -> torch.Tensor:
    data = torch.full(shape, float("nan"))
    initialize([Slice(data, parameter, start)], MODEL, 7)
    return data


def test_a_slice_is_a_part_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_BLOCK_ROWS_BYTES", 4 * 64 * 50)  # 50 rows a run: slices begin and end inside
    whole = filled((0, 0), (384, 64))
    assert whole[:300].std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(whole[300:], torch.zeros(84, 64)), "rows that pad the vocabulary"
    for start, shape in [((0, 0), (128, 64)), ((130, 0), (131, 64)), ((270, 32), (60, 32)), ((384, 0), (0, 64))]:
        rows, columns = (slice(a, a + n) for a, n in zip(start, shape, strict=True))
        assert torch.equal(filled(start, shape), whole[rows, columns]), start


@pytest.mark.parametrize("parameter", [p for p in block_parameters(MIXTURE, 1) if ".moe." in p.name], ids=str)
def test_a_slice_of_experts_is_a_part_of_the_whole(monkeypatch: pytest.MonkeyPatch, parameter: Parameter) -> None:
    """Whoever of ep, expert_tp and ZeRO holds it; no two experts, nor matrices, begin alike."""
    monkeypatch.setattr(init, "_BLOCK_ROWS_BYTES", 4 * 64 * 50)
    whole = filled((0,) * len(parameter.shape), parameter.shape, parameter)
    if parameter.role in ("bias", "buffer"):
        assert not whole.any()
        return
    residual = parameter.name.endswith("down.weight")
    assert whole.std() == pytest.approx(0.02 / 2 if residual else 0.02, rel=0.1)
    if not parameter.expert:
        return
    assert len({float(expert[0, 0]) for expert in whole.chunk(6)}) == 6
    for ep, expert_tp, parts in ((1, 1, 5), (2, 1, 4), (3, 2, 1), (6, 3, 7)):
        rows, width = parameter.local_shape(1, ep, expert_tp)
        for at in range(ep * expert_tp):
            top, left = at // expert_tp * rows, at % expert_tp * width
            step = -(-rows // parts)
            for first in range(0, rows, step):
                number = min(step, rows - first)
                mine = filled((top + first, left), (number, width), parameter)
                assert torch.equal(mine, whole[top + first : top + first + number, left : left + width])


@pytest.mark.parametrize("width", [1, 3, 5, 8, 24, 33, 96])
def test_rows_alone_are_those_of_the_whole(width: int) -> None:
    """Whatever is before and behind them, and however numbers fill the ends."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(11)

    for rows in (1, 15, 64, 101, 3000):
        whole = torch.randn(rows, width, generator=generator())
        for low, high in ((0, rows), (rows // 3, rows // 2), (rows // 2, rows), (rows - 1, rows), (0, 1)):
            begin, drawn = init._normal_rows(generator(), rows, width, low, high)
            assert begin <= low and begin + len(drawn) >= high
            assert torch.equal(drawn, whole[begin : begin + len(drawn)]), (rows, low, high)


@pytest.mark.parametrize(("start", "rows", "expected"), [(96, 96, 96), (100, 20, 20), (90, 10, 10)])
def test_only_rows_that_are_kept_are_drawn(
    monkeypatch: pytest.MonkeyPatch, start: int, rows: int, expected: int
) -> None:
    """Also of a matrix that one generator draws."""
    monkeypatch.setattr(init, "_BLOCK_ROWS_BYTES", 4 * 64 * 48)
    drawn: list[int] = []
    real = torch.randn

    def counting(*shape: int, **options: Any) -> torch.Tensor:
        drawn.append(shape[0])
        return real(*shape, **options)

    monkeypatch.setattr(torch, "randn", counting)
    filled((start, 0), (rows, 64))
    assert sum(drawn) == expected


def weights(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every weight of this rank's stages, whole."""
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh

    recipe = resolved(raw)
    stages = build_stages(recipe, Mesh.of(recipe, torch.device("cpu")))
    return {
        shard.parameter.name: shard.layout.full_tensor().detach() for stage in stages for shard in stage.sharding.shards
    }


@pytest.mark.parametrize("raw", [case(2, 1, 2, zero=3), case(1, 2, 2), case(1, 1, 4, dp_replicate=2)], ids=str)
def test_every_topology_begins_with_the_same_weights(world: World, raw: dict[str, Any]) -> None:
    model = {**raw["model"], "vocab_size": 301, "ffn_hidden_size": 90, "make_vocab_size_divisible_by": 2}  # uneven
    (alone,) = world.run(1, weights, {**case(), "model": model})
    ranks = raw["topology"]["tp"] * raw["topology"]["pp"] * raw["topology"]["dp"]
    seen: set[str] = set()
    for rank in world.run(ranks, weights, {**raw, "model": model}):
        for name, tensor in rank.items():
            assert torch.equal(tensor, alone[name]), name
            seen.add(name)
    assert seen == alone.keys()


@pytest.mark.parametrize("zero", [0, 1])
def test_the_rows_of_a_rank_are_those_that_others_expect_of_it(zero: int) -> None:
    """`spec.slices`, by which Muon sends matrices to and fro, and what is filled."""
    model = {"num_kv_heads": 2, "moe": MOE.model_dump()}
    raw = case(4, 2, 2, cp=2, ep=2, expert_tp=2, zero=zero, model=model, training={"micro_batch_size": 1})
    recipe = resolved(raw)
    parameters = [p for p in block_parameters(recipe.model, 0) if len(p.shape) == 2]
    for rank in range(32):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=32)
        try:
            mesh = Mesh.of(recipe, torch.device("cpu"))
            at, experts = mesh.topology.expert_coordinates(rank), mesh.experts
            assert experts is not None and (at.ep, at.expert_tp) == (experts.ep.rank, experts.tp.rank)
            assert mesh.tp.rank == mesh.coordinates.tp
            for parameter in parameters:
                rectangle = kept(parameter, mesh.topology, recipe.topology, rank % 16)
                (top, left), (rows, columns) = mesh.slice_of(parameter), mesh.local_shape(parameter)
                ranks = mesh.data_ranks(parameter)
                part = -(-rows // ranks.parts)
                first, last = (top + min(at * part, rows) for at in (ranks.part, ranks.part + 1))
                assert rectangle == (range(first, last), range(left, left + columns)), (parameter.name, rank)
        finally:
            dist.destroy_process_group()
