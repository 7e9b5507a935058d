"""What ranks that share a sequence exchange: values, gradients, and attention over it against attention on one rank."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.world import World
from tplaunch.parallel.mesh import ContextParallel

S, B, D = 48, 2, 8
# Documents within one piece of 12 or 6 tokens, from one piece to the next, over several, and up to a piece's end.
LENGTHS = [[2, 5, 5, 7, 17, 12], [1, 35, 3, 9]]


def shared(cp: int, kind: Any) -> ContextParallel:
    """All ranks, as those that share a sequence."""
    from torch.distributed.device_mesh import init_device_mesh

    return ContextParallel(init_device_mesh("cpu", (cp,), mesh_dim_names=("cp",))["cp"], kind)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def mine(x: Tensor, cp: ContextParallel) -> Tensor:
    """This rank's pieces of [s, ...]."""
    return torch.cat([x[piece.start : piece.stop] for piece in cp.pieces(len(x))])


def attention(
    cp_size: int, kind: str, heads: tuple[int, int], window: int | None, documents: bool, value_dim: int = D
) -> list[float]:
    """The largest differences of output and gradients of q, k and v from those of one rank."""
    from tplaunch.model.attend import Attending, attend, document_starts
    from tplaunch.model.block import _attend_pieces
    from tplaunch.parallel.context import begin_gather, end_gather, to_heads, to_tokens

    cp, how = shared(cp_size, kind), Attending(window)
    widths = [(heads[0], D), (heads[1], D), (heads[1], value_dim)]
    whole = [drawn(S, B, count, D + i)[..., :d].contiguous() for i, (count, d) in enumerate(widths)]
    grad = drawn(S, B, heads[0] * value_dim)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    starts = document_starts(positions) if documents else None
    for x in whole:
        x.requires_grad_()
    expected = attend(*whole, how, starts=starts)
    expected.backward(grad)
    q, k, v = (mine(x.detach(), cp).requires_grad_() for x in whole)
    if kind == "allgather":
        all_k, all_v = end_gather(begin_gather(k, v, cp), cp, [k.shape[2:], v.shape[2:]])
        assert all_k.equal(whole[1]) and all_v.equal(whole[2])
        parts = None if starts is None else cp.cut(starts)
        given = torch.cat(_attend_pieces(q, all_k, all_v, how=how, starts=parts, pieces=cp.pieces(S)))
    else:
        given = to_tokens(attend(*to_heads(q, k, v, cp), how, starts=starts), cp)
    given.backward(mine(grad, cp))
    pairs = [(given, expected), *((x.grad, y.grad) for x, y in zip((q, k, v), whole, strict=True))]
    return [float((x - mine(y, cp)).abs().max()) for x, y in pairs]


@pytest.mark.parametrize("cp", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "heads"),
    [("allgather", (4, 2)), ("allgather", (4, 1)), ("ulysses", (4, 4)), ("ulysses", (4, 1)), ("ulysses", (12, 6))],
)
def test_attention_is_that_of_one_rank(world: World, cp: int, kind: str, heads: tuple[int, int]) -> None:
    for differences in world.run(cp, all_ways, cp, kind, heads):
        assert len(differences) == 5 and max(map(max, differences)) < 1e-12


def all_ways(cp: int, kind: str, heads: tuple[int, int]) -> list[list[float]]:
    """`attention` with and without a window and documents, and with narrower values."""
    ways = [*product((None, 7), (False, True)), (None, True, D // 2)]
    return [attention(cp, kind, heads, *way) for way in ways]


def sums(cp_size: int) -> tuple[list[float], int]:
    """The gradient of a key that every rank has another gradient for, and how often its heads are sent by Ulysses."""
    from tplaunch.parallel.context import begin_gather, copies_of_heads, end_gather

    cp = shared(cp_size, "allgather")
    k = torch.ones(8 // cp_size, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    all_k, all_v = end_gather(begin_gather(k, k, cp), cp, [k.shape[2:]] * 2)
    # In bf16, 256 + 1 is 256: rank by rank nothing would come of the ones.
    (all_k.sum() * (256.0 if dist.get_rank() == 0 else 1.0) + all_v.sum() * 0.0).backward()
    assert k.grad is not None
    return k.grad.flatten().float().tolist(), copies_of_heads(6, cp_size)


def test_gradients_of_keys_are_summed_wide(world: World) -> None:
    for found, copies in world.run(4, sums, 4):
        assert found == [260.0, 260.0]  # 259, to the nearest in bf16
        assert copies == 2


def pair(x: Tensor, split: bool) -> tuple[Tensor, ...]:
    """Output and gradients of a `ColumnPair`, or of `column_parallel`, of one input; two tp ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    from tplaunch.parallel.layers import ColumnPair, ColumnParallelLinear, column_parallel
    from tplaunch.parallel.mesh import TensorParallel

    tp = TensorParallel(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"], sequence_parallel=True)
    torch.set_default_dtype(torch.float64)
    layers = [ColumnParallelLinear(6, 4, bias=True, tp=tp) for _ in range(3)]
    for number, layer in enumerate(layers):
        for weight in layer.parameters():
            torch.nn.init.normal_(weight.to_local(), generator=torch.Generator().manual_seed(number + 7 * tp.rank))
    x = x.chunk(2)[tp.rank].requires_grad_()
    if split:
        both = ColumnPair(tp)
        first, link = both.first(x, *layers[1:])
        y = torch.cat([both.second(x, link, layers[0]), first], -1)
    else:
        y = column_parallel(x, *layers)
    (y * torch.arange(1.0, 1.0 + y.numel()).view_as(y).sin()).sum().backward()
    grads = [weight.grad.to_local() for layer in layers for weight in layer.parameters()]
    return tuple(t.detach() for t in (y, x.grad, *grads))


def test_two_halves_of_a_projection_are_the_whole(world: World) -> None:
    x = torch.randn(8, 2, 6, dtype=torch.float64)
    for halves, whole in zip(world.run(2, pair, x, True), world.run(2, pair, x, False), strict=True):
        assert len(halves) == 8
        for ours, theirs in zip(halves, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
