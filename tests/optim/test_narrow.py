"""Moments and gradients in bf16: updates as in fp32, stored rounded; on any topology, in the bytes that are planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.recipes import case, ranks, resolved
from tests.training import batch, train, trainer
from tests.world import World
from tplaunch.optim import adamw
from tplaunch.optim.adamw import NarrowAdamW
from tplaunch.plan.case import Case
from tplaunch.plan.memory import gradients, optimizer_state
from tplaunch.spec.gpu import GPUS

FOUR = {"num_layers": 4}
STATE = {"state_dtype": "bf16"}
BOTH = {**STATE, "gradient_dtype": "bf16"}
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in (7, 300, 1, 65)]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]


def step(optimizer: Any, parameters: list[nn.Parameter], number: int, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in parameters:
        weight.grad_dtype = dtype
        weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(number == 2))
    optimizer.step()


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_torch_with_moments_rounded(monkeypatch: pytest.MonkeyPatch, moments: torch.dtype) -> None:
    monkeypatch.setattr(adamw, "_PIECE", 64)  # whole vectors: what is left over is computed otherwise
    ours, theirs = weights(), weights()
    narrow = NarrowAdamW(groups(ours), **SETTINGS, moments=moments)
    plain = torch.optim.AdamW(groups(theirs), **SETTINGS, fused=True)
    for number in range(6):  # of which 2 is skipped
        before = [weight.detach().clone() for weight in ours]
        step(narrow, ours, number)
        step(plain, theirs, number)
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True)) == (number == 2)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            for slot in ("exp_avg", "exp_avg_sq"):
                kept = plain.state[other][slot].to(moments)  # to the nearest
                assert torch.equal(narrow.state[one][slot], kept)
                plain.state[other][slot].copy_(kept)
            assert narrow.state[one]["step"] == plain.state[other]["step"]


def test_narrow_gradients_are_widened_first() -> None:
    ours, theirs = weights(), weights()
    narrow = NarrowAdamW(groups(ours), **SETTINGS, moments=torch.float32)
    plain = torch.optim.AdamW(groups(theirs), **SETTINGS, fused=True)
    step(narrow, ours, 1, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for weight in theirs:
        weight.grad = torch.randn(weight.shape, generator=generator).bfloat16().float() / 2
    plain.step()
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(ours, theirs, strict=True))


def held(raw: dict[str, Any], root: str) -> tuple[list[tuple[float, float]], float, float, float, float]:
    """Losses of some steps; bytes of moments and gradients that this rank holds, and that are planned."""
    made = trainer(raw, root)
    losses, shardings = train(made, 3), made.step.optimizer.shardings
    made.step.pipeline.train(batch(made), 1.0)  # gradients under FSDP2 are gone after a step: those of another
    made.step.gradients.complete()
    found = [s.gradients if hasattr(s, "gradients") else None for s in shardings]
    kept = sum(
        one.nbytes if one is not None else sum(s.gradient(shard).nbytes for shard in s.shards)
        for one, s in zip(found, shardings, strict=True)
    )
    moments = sum(
        state[slot].nbytes
        for part in made.step.optimizer.parts.values()
        for state in part.state.values()
        for slot in state
        if slot != "step"
    )
    planned = Case(resolved(raw), GPUS["h100-80gb"])
    stages = planned.stages_on(made.mesh.coordinates.pp)
    return losses, moments, optimizer_state(planned, stages), kept, gradients(planned, stages)


def sized(tp: int = 1, pp: int = 1, dp: int = 1, optimizer: dict[str, Any] = BOTH, **more: Any) -> dict[str, Any]:
    model = {**FOUR, "hidden_size": 128, "ffn_hidden_size": 256}
    return case(tp, pp, dp, model=model, optimizer=optimizer, training={"precision": "bf16"}, **more)


@pytest.mark.parametrize(
    "name", ["tp2", "dp2-zero1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "dp2-zero3"))]
)
def test_bytes_held_are_those_planned(world: World, tmp_path: Path, name: str) -> None:
    more: dict[str, Any] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}.get(name) or {"dp": 2, "zero": int(name[-1])}
    each = world.run(2, held, sized(**more), str(tmp_path))
    wide = world.run(2, held, sized(**more, optimizer={}), str(tmp_path))
    for (losses, moments, of_moments, kept, of_gradients), plain in zip(each, wide, strict=True):
        assert moments == pytest.approx(of_moments, rel=0.05)
        assert kept == pytest.approx(of_gradients, rel=0.05)
        assert 2 * moments == plain[1] == pytest.approx(plain[2], rel=0.05)
        assert plain[3] == pytest.approx(plain[4], rel=0.05)
        assert kept == (plain[3] if name == "dp2-zero3" else plain[3] / 2)
        assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in plain[0]], rel=5e-3)
        assert [norm for _, norm in losses] == pytest.approx([norm for _, norm in plain[0]], rel=2e-2)


def trained(raw: dict[str, Any], root: str) -> list[tuple[float, float]]:
    return train(trainer(raw, root), 6)


@pytest.mark.parametrize("optimizer", [{}, {"name": "muon"}], ids=["adamw", "muon"])
def test_any_topology_trains_the_same_with_bf16_moments(
    world: World, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    run: dict[str, Any] = {"model": FOUR, "optimizer": {**STATE, **optimizer}}
    (expected,) = world.run(1, trained, case(**run), str(tmp_path))
    (plain,) = world.run(1, trained, case(**{**run, "optimizer": optimizer}), str(tmp_path))
    assert expected[:2] == plain[:2] and expected[3:] != plain[3:], "moments were rounded, and nothing else"
    raw = case(1, 1, 2, zero=3, **run)
    for found in world.run(ranks(raw), trained, raw, str(tmp_path)):
        assert np.allclose(found, expected, rtol=5e-4)


@pytest.mark.slow
def test_every_topology_does(world: World, tmp_path: Path) -> None:
    run: dict[str, Any] = {"model": FOUR, "optimizer": STATE}
    (expected,) = world.run(1, trained, case(**run), str(tmp_path))
    for raw in (case(2, sequence_parallel=True, **run), case(1, 2, 2, zero=1, **run), case(2, 1, 2, zero=2, **run)):
        for found in world.run(ranks(raw), trained, raw, str(tmp_path)):
            assert np.allclose(found, expected, rtol=5e-4)


def saved(raw: dict[str, Any], root: str) -> dict[str, Tensor]:
    made = trainer(raw, root)
    train(made, 3)
    made.save(wait=True)
    return {name: tensor.full_tensor().clone() for name, tensor in made.step.optimizer.state()}


def loaded(raw: dict[str, Any], root: str) -> tuple[dict[str, Tensor], int]:
    made = trainer(raw, root)
    made.resume("auto")
    found = {name: tensor.full_tensor().clone() for name, tensor in made.step.optimizer.state()}
    train(made, 1)
    return found, made.progress.updates


@pytest.mark.parametrize("narrow_first", [True, False])
def test_a_checkpoint_is_read_into_other_moments(world: World, tmp_path: Path, narrow_first: bool) -> None:
    narrow = case(1, 1, 2, zero=3, model=FOUR, optimizer=STATE)
    wide = case(2, model=FOUR)
    first, then = (narrow, wide) if narrow_first else (wide, narrow)
    state = world.run(2, saved, first, str(tmp_path))[0]
    for found, updates in world.run(2, loaded, then, str(tmp_path)):
        assert updates == 4
        for name, tensor in found.items():
            assert tensor.dtype == (torch.float32 if narrow_first else torch.bfloat16)
            assert torch.equal(tensor, state[name].to(tensor.dtype))
