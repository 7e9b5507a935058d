"""What CUDA runs: compiled blocks, and attention that keeps no matrix of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.machine import choose, take_device
from tests.kernels.cases import CASES as FUSED_CASES
from tests.kernels.cases import difference
from tests.recipes import case, resolved
from tests.train.test_topology_invariance import train
from tests.world import World

pytestmark = pytest.mark.gpu


def train_here(raw: dict[str, Any]) -> list[tuple[float, float]]:
    return train(raw, take_device())


def test_compiled_follows_eager(world: World, note: Callable[..., None]) -> None:
    steps = {"steps": 4}
    (eager,) = world.run(1, train_here, case(training=steps))
    (compiled,) = world.run(1, train_here, case(training={**steps, "compile": True}))
    pairs = [pair for step in zip(compiled, eager, strict=True) for pair in zip(*step, strict=True)]
    worst = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    note(worst_relative_difference=worst)
    assert compiled != eager, "nothing was compiled"
    assert worst < 1e-4


def fused_here(name: str) -> list[float]:
    """Relative differences of a fused kernel's outputs and gradients from torch's operations in fp64 on the CPU."""
    return difference(FUSED_CASES[name], take_device())


@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_kernels_are_right(world: World, note: Callable[..., None], name: str) -> None:
    (found,) = world.run(1, fused_here, name)
    note(worst_relative_difference=max(found))
    assert max(found) < 2e-2  # bf16 in and out


def operations(raw: dict[str, Any]) -> list[str]:
    """Names of the operations and kernels of a step, on a rank."""
    import torch
    from torch.profiler import profile

    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import random_batch
    from tplaunch.train.step import TrainStep

    recipe, device = resolved(raw), take_device()
    step = TrainStep(recipe, Mesh.of(recipe, device))
    batch = random_batch(recipe, 1, True)
    step.run(batch)
    with profile() as profiled:
        step.run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return [event.key for event in profiled.key_averages()]


def test_attention_is_flash_attention(world: World, note: Callable[..., None]) -> None:
    length = choose(1024, 64)
    model = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2}
    raw = case(model=model, training={"precision": "bf16", "seq_len": length})
    (names,) = world.run(1, operations, raw)
    attention = sorted(name for name in names if "attention" in name and name.startswith("aten::"))
    note(operations=attention)
    assert any("flash_attention" in name or "cudnn_attention" in name for name in attention), attention
    assert not any("attention_math" in name for name in attention), attention


ASKED: dict[str, dict[str, Any]] = {
    "causal": {},
    "documents": {"documents": True},
    "window": {"window": 100},
    "window, documents": {"window": 100, "documents": True},
    "a piece": {"documents": True, "first_query": 512},
    "soft cap": {"softcap": 2.0, "documents": True},
    "sinks": {"sinks": True, "window": 100},
    "fp32": {"documents": True, "dtype": "float32"},
    "fp32, causal": {"dtype": "float32"},
    "narrower values": {"value_dim": 32},
    "narrower values, fp32": {"value_dim": 32, "dtype": "float32"},
    "narrower values, documents": {"value_dim": 32, "documents": True},
    "narrower values, sinks": {"value_dim": 32, "sinks": True},
}


def attention_here(asked: dict[str, Any]) -> tuple[list[float], float]:
    """Relative differences of attention and its gradients from fp64 on the CPU, and the peak of memory for each byte of
    queries."""
    import torch

    from tplaunch.model.attend import Attending, attend, document_starts

    device, length, first = take_device(), 1500, asked.get("first_query", 0)
    dtype = getattr(torch, asked.get("dtype", "bfloat16"))
    random = torch.Generator().manual_seed(0)
    value_dim = asked.get("value_dim", 64)
    sizes = ((length - first, 2, 8, 64), (length, 2, 2, 64), (length, 2, 2, value_dim), (8,))
    leaves = [torch.randn(size, generator=random).to(dtype) for size in sizes]
    grad = torch.randn(length - first, 2, 8 * value_dim, generator=random).to(dtype)
    places = torch.arange(length).repeat(2, 1)
    places[0, 700:] -= 700
    places[1, 130:] -= 130
    starts = document_starts(places)[:, first:] if asked.get("documents") else None

    def run(where: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        mine = [x.to(where, dtype).requires_grad_() for x in leaves]
        how = Attending(asked.get("window"), asked.get("softcap"))
        sinks = mine[3] if asked.get("sinks") else None
        begin = None if starts is None else starts.to(where)
        out = attend(*mine[:3], how, starts=begin, sinks=sinks, first_query=first)
        used = mine if sinks is not None else mine[:3]
        return [x.double().cpu() for x in (out, *torch.autograd.grad(out, used, grad.to(where, dtype)))]

    expected = run(torch.device("cpu"), torch.float64)
    if device.type == "cuda":
        run(device, dtype)  # what is compiled is compiled
        torch.cuda.reset_peak_memory_stats()
    found = run(device, dtype)
    peak = torch.cuda.max_memory_allocated() / leaves[0].nbytes if device.type == "cuda" else 0.0
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)], peak


@pytest.mark.parametrize("name", ASKED)
def test_attention_of_every_kind_is_right_and_makes_no_matrix(
    world: World, note: Callable[..., None], name: str
) -> None:
    asked = ASKED[name]
    ((differences, peak),) = world.run(1, attention_here, asked)
    note(worst_relative_difference=max(differences), peak_over_input=peak)
    assert max(differences) < (2e-2 if "dtype" not in asked else 2e-3)
    assert peak < 20  # the scores of all heads alone would be 23


def grouped_differences(sizes: list[int]) -> list[float]:
    """Grouped matmuls by one kernel against a matmul for each group, in memory that held something else: relative
    differences of outputs and gradients."""
    import torch

    from tplaunch.parallel import grouped
    from tplaunch.parallel.experts import Groups

    device = take_device()
    torch.manual_seed(0)
    h, f = 64, 128
    tensors = [torch.randn(sum(sizes), width, device=device).bfloat16() for width in (h, f)]
    tensors += [torch.randn(len(sizes) * h, f, device=device).bfloat16() for _ in range(3)]
    has_kernel, found = grouped._has_kernel, []
    try:
        for one_kernel in (True, False):
            dirty = torch.full((4 * len(sizes) * h * f,), torch.nan, device=device, dtype=torch.bfloat16)
            del dirty
            grouped._has_kernel = has_kernel if one_kernel else lambda *_: False
            x, y, gate, up, down = (tensor.clone().requires_grad_() for tensor in tensors)
            groups = Groups(torch.tensor(sizes, device=device), sum(sizes))
            outputs = [*grouped.grouped_columns(x, groups, gate, up), grouped.grouped_row(y, groups, down)]
            sum(output.float().square().sum() for output in outputs).backward()
            found.append([*outputs, *(leaf.grad for leaf in (x, y, gate, up, down))])
    finally:
        grouped._has_kernel = has_kernel
    return [float(((a - b).abs().max() / b.abs().max()).float()) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("sizes", [[70, 0, 33, 1], [0, 0, 128, 0], [64] * 16], ids=str)
def test_experts_matmuls_are_one_kernel(world: World, note: Callable[..., None], sizes: list[int]) -> None:
    (differences,) = world.run(1, grouped_differences, sizes)
    note(worst_relative_difference=max(differences))
    assert max(differences) < 2e-2  # not a number, where memory was left as it was


def test_a_step_with_experts_uses_it(world: World, note: Callable[..., None]) -> None:
    moe = {"experts": 8, "top_k": 2, "ffn_hidden_size": 64, "shared_ffn_hidden_size": 64, "aux_loss": 0.01}
    (names,) = world.run(1, operations, case(model={"moe": moe}, training={"precision": "bf16"}))
    found = sorted(name for name in names if "grouped_mm" in name)
    note(operations=found)
    assert found or choose(gpu=False, cpu=True)
