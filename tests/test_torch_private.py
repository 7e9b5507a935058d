"""Each name of torch that is not public: it is there, and does what we take it for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.world import World
from tplaunch import torch_private


@pytest.mark.parametrize("name", sorted(torch_private._LAZY))
def test_names_that_are_imported_late(name: str) -> None:
    assert getattr(torch_private, name) is not None


def test_a_missing_name_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_private._LAZY, "FakeStore", "torch.no_such_module")
    with pytest.raises(torch_private.UnsupportedTorch, match=r"has no torch.no_such_module.FakeStore, which tplaunch"):
        torch_private.FakeStore  # noqa: B018
    monkeypatch.delattr(torch, "_foreach_mul_")
    with pytest.raises(torch_private.UnsupportedTorch, match=r"torch._foreach_mul_, which tplaunch uses: install"):
        torch_private.scale_in_place([], 1.0)
    with pytest.raises(AttributeError, match="no_such_name"):
        torch_private.no_such_name  # noqa: B018


def test_tensors_in_one_call() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[5.0], [12.0]])]
    assert [norm.item() for norm in torch_private.norms(tensors)] == [5.0, 13.0]
    torch_private.scale_in_place(tensors, 2.0)
    assert tensors[0].tolist() == [6.0, 8.0]
    copies = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 1)]
    torch_private.copy_in_place(copies, tensors)
    assert [copy.flatten().tolist() for copy in copies] == [[6.0, 8.0], [10.0, 24.0]]
    torch_private.copy_in_place([], [])
    torch_private.zero_in_place(tensors)
    assert not any(tensor.any() for tensor in tensors)
    torch_private.zero_in_place([])  # of a stage that is an embedding alone


def test_storages_are_told_apart() -> None:
    a, b = torch.zeros(4), torch.zeros(4)
    assert torch_private.storage_id(a) == torch_private.storage_id(a[1:]) != torch_private.storage_id(b)


def test_the_number_of_a_storage_stays_its_own_while_it_is_watched() -> None:
    watched = [(torch_private.storage_id(a), torch_private.weak_storage(a)) for a in map(torch.zeros, range(1, 65))]
    numbers = {number for number, _ in watched}  # of tensors that are gone
    others = [torch.zeros(length) for length in range(1, 65)]
    assert len(numbers) == 64
    assert not numbers & {torch_private.storage_id(other) for other in others}


def test_the_engine_says_which_nodes_a_pass_runs() -> None:
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append([torch_private.will_execute(node) for node, _ in ctx.next_functions])
            return grad, grad

    x, y = (torch.ones((), requires_grad=True) for _ in range(2))
    a, b = x * 1, y * 1
    torch.autograd.grad(Ask.apply(a, b), [a])
    assert seen == [[True, False]]


def test_what_gpu_memory_holds_is_remembered_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names and their arguments; with a GPU, tests/gpu/test_launch.py does it."""
    calls = []
    for name in ("_record_memory_history", "_dump_snapshot"):
        takes = inspect.signature(getattr(torch.cuda.memory, name))
        monkeypatch.setattr(
            torch.cuda.memory,
            name,
            lambda *args, _takes=takes, _name=name, **more: calls.append((_name, _takes.bind(*args, **more).arguments)),
        )
    torch_private.record_memory()
    torch_private.write_memory("file")
    torch_private.write_memory(None)
    ends = ("_record_memory_history", {"enabled": None})
    assert calls == [
        ("_record_memory_history", {"stacks": "python"}),
        ("_dump_snapshot", {"filename": "file"}),
        ends,
        ends,
    ]


def test_collectives_and_fused_matmuls_are_registered() -> None:
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor"):
        assert hasattr(torch_private.collective_ops, name)
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        assert hasattr(torch_private.symmetric_memory_ops, name)


def unflattened() -> tuple[int, int]:
    """This rank's place on the two axes of a mesh that was one."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    split = torch_private.unflatten(mesh, (2, 2), ("kv_head", "kv_copy"))
    return split.get_local_rank("kv_head"), split.get_local_rank("kv_copy")


def limited() -> str:
    """What a rank says whose peer does not come to a collective in time."""
    group = dist.new_group([0, 1])
    spared = dist.new_group([0, 1])
    torch_private.set_group_timeouts(0.5, without=[spared])
    said = ""
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            said = str(error)
    dist.all_reduce(torch.ones(1), group=spared)
    torch_private.set_group_timeouts(60)
    return said


def test_a_mesh_seen_as_one_of_two_axes(world: World) -> None:
    assert world.run(4, unflattened) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_collectives_keep_to_their_timeout(world: World) -> None:
    first, other = world.run(2, limited)
    assert "Timed out" in first and other == ""


def placed_rows(tp_dim: int) -> bool:
    """Whether rows of a [12, 4] parameter, cut over tp 2 and dp 2, know their places."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    world = dist.device_mesh.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_shard", "pp", "tp"))
    whole = torch.arange(48.0).view(12, 4)
    layout = distribute_tensor(whole, world["tp"], [Shard(tp_dim)])
    part = world.get_local_rank("dp_shard")
    rows = layout.to_local().chunk(2)[part].clone()
    placed = torch_private.rows_of(layout, rows, world["dp_shard"])
    same = torch_private.with_local(placed, rows + 1)
    assert isinstance(placed, DTensor)
    assert placed.to_local().data_ptr() == rows.data_ptr()
    return torch.equal(placed.full_tensor(), whole) and torch.equal(same.full_tensor(), whole + 1)


@pytest.mark.parametrize("tp_dim", [0, 1])
def test_rows_know_their_place_in_the_whole(world: World, tp_dim: int) -> None:
    assert world.run(4, placed_rows, tp_dim) == [True] * 4


_WITHOUT_DYNAMO = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from tplaunch.torch_private import as_parameter, leave_out_dynamo

def trained(make):
    weight = make(DTensor.from_local(torch.ones(3), mesh, (Replicate(),), run_check=False))
    assert isinstance(weight, nn.Parameter) and isinstance(weight, DTensor) and weight.is_leaf
    plain = nn.Parameter(weight.to_local().detach())
    for optimizer in (torch.optim.AdamW([plain], fused=True), torch.optim.SGD([plain], lr=0.1)):
        (plain * torch.arange(3.0)).sum().backward()
        optimizer.step()
    return plain.detach()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
leave_out_dynamo()
without = trained(as_parameter)
assert "torch._dynamo" not in sys.modules
assert torch.equal(without, trained(nn.Parameter)) and "torch._dynamo" in sys.modules
"""


def test_a_process_that_compiles_nothing_loads_no_dynamo() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_DYNAMO], check=True)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_multiplies() -> None:
    x, weight = torch.randn(4, 8, 16), torch.randn(12, 16)
    found = torch_private.onednn_linear(x, weight)
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)
    assert not found._is_view()
