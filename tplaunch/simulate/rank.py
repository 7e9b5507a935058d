"""Runs one rank of a world that is not there through one step of its real trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tplaunch.model.build import Stage
from tplaunch.parallel import experts
from tplaunch.parallel.flat import FlatSharding
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.simulate.phantom import Phantom, fused_rms_norm
from tplaunch.simulate.record import Collective, Message, Recorder, replaced
from tplaunch.spec.schedules import stages_of
from tplaunch.spec.topology import Topology
from tplaunch.torch_private import FakeStore
from tplaunch.train.batch import random_batch
from tplaunch.train.pipeline import hidden_states
from tplaunch.train.step import TrainStep, make_pipeline


@dataclass(frozen=True)
class RankRecord:
    """What a rank held and sent in one step.

    Args:
        rank: the rank.
        parameters: elements of its weights, whole over data parallel.
        peak: bytes at the fullest moment.
        collectives, messages: in order.
    """

    rank: int
    parameters: int
    peak: int
    collectives: list[Collective]
    messages: list[Message]


def simulate_rank(recipe: Recipe, rank: int) -> RankRecord:
    """Build the training step of a rank and run it once, as in the midst of a run: with optimizer state.

    Args:
        recipe: resolved, without torch.compile, whose kernels need a GPU.
    """
    recorder = Recorder()
    with _in_a_world(recipe, rank, recorder) as (mesh, phantom):
        step = TrainStep(recipe, mesh, draw=False)
        for _ in step.optimizer.state():
            pass
        recorder.active = True
        step.run(random_batch(recipe, mesh.topology.dp, step.pipeline.reads_data))
        cut = mesh.topology.tp, mesh.topology.ep, mesh.topology.expert_tp
        parameters = sum(p.local_count(*cut) for s in step.stages for p in s.parameters.values())
        return RankRecord(rank, parameters, phantom.peak, recorder.collectives, recorder.messages)


def pipeline_messages(recipe: Recipe, rank: int) -> list[Message]:
    """What a rank sends to and receives from its pipeline neighbours in one step, in order: those of `simulate_rank`,
    from the real schedule over stages that hold no blocks. Takes a fraction of a second."""
    unsharded = recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"zero": 1})})
    parallelism = recipe.topology
    recorder = Recorder(active=True)
    with _in_a_world(unsharded, rank, recorder) as (mesh, _):
        mine = stages_of(mesh.coordinates.pp, parallelism.pp, parallelism.virtual_stages, parallelism.schedule)
        stages = [_hollow_stage(unsharded, mesh, i) for i in mine]
        pipeline = make_pipeline(stages, mesh, unsharded)
        pipeline.train(random_batch(unsharded, mesh.topology.dp, pipeline.reads_data), 1.0)
    return recorder.messages


def _hollow_stage(recipe: Recipe, mesh: Mesh, index: int) -> Stage:
    module = _Hollow(recipe, mesh, index)
    precision = recipe.training.precision
    sharding = FlatSharding(module, {}, mesh, precision=precision, in_place=False, overlap=False, compiled=False)
    return Stage(index, module, sharding, {})  # type: ignore[arg-type]


class _Hollow(nn.Module):
    """A pipeline stage's inputs and outputs, with one weight between them."""

    def __init__(self, recipe: Recipe, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.shape = hidden_states(recipe, mesh)
        self.last = index == recipe.topology.pp * recipe.topology.virtual_stages - 1
        self.weight = nn.Parameter(torch.empty(1, dtype=self.shape.dtype))

    def forward(
        self, x: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, loss_scale: float = 1.0
    ) -> Tensor:
        if not x.is_floating_point():
            x = torch.empty(self.shape.shape, dtype=self.shape.dtype)
        x = x * self.weight
        return torch.stack([x.sum(dtype=torch.float32)]) if self.last else x


@contextmanager
def _in_a_world(recipe: Recipe, rank: int, recorder: Recorder) -> Iterator[tuple[Mesh, Phantom]]:
    """This process as a rank whose peers answer at once, and whose tensors hold nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=Topology.of(recipe).world_size)
    try:
        mesh = Mesh.of(recipe, torch.device("cpu"))
        with (
            replaced(dist, "new_group", _fake_group(dist.new_group)),
            recorder.watching_pipeline(),
            replaced(F, "rms_norm", fused_rms_norm),
            replaced(experts, "read_counts", balanced_counts),
            Phantom(recorder.record) as phantom,
        ):
            yield mesh, phantom
    finally:
        dist.destroy_process_group()


def balanced_counts(counts: Tensor, total: int) -> list[int]:
    """`tplaunch.parallel.experts.read_counts` where there are no numbers: every expert gets as many rows, from every
    rank. A rest goes where equal runs of counts still have equal sums."""
    places = counts.numel()
    return [(place + 1) * total // places - place * total // places for place in range(places)]


def _fake_group(new_group):  # type: ignore[no-untyped-def]
    """No group of another backend: it would wait for its peers."""

    def made(*args, backend=None, **keywords):  # type: ignore[no-untyped-def]
        return new_group(*args, **keywords)

    return made
