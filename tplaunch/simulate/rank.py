"""One rank of a world that is not there, through one step of its real trainer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tplaunch.model.build import Stage
from tplaunch.observe.heartbeat import Heartbeat
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.rundir import RunDir
from tplaunch.simulate.phantom import Phantom, fused_rms_norm
from tplaunch.simulate.record import Collective, Message, Recorder, replaced
from tplaunch.topology import Topology, stages_of
from tplaunch.train.batch import random_batch
from tplaunch.train.pipeline import Pipeline
from tplaunch.train.stop import NeverStopped
from tplaunch.train.trainer import Trainer


@dataclass(frozen=True)
class RankRecord:
    """What a rank held and said in one step.

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


def simulate_rank(recipe: Recipe, topology: Topology, rank: int) -> RankRecord:
    """Build the trainer of a rank and run one step, as one in the midst of a run: with optimizer state.

    Args:
        recipe: resolved, without torch.compile, whose kernels need a GPU.
    """
    recorder = Recorder()
    with _in_a_world(recipe, topology, rank, recorder) as (mesh, phantom), tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        run_dir.create()
        beat = Heartbeat(run_dir.root / "beat", rank)
        trainer = Trainer(recipe, mesh, run_dir, NeverStopped(), beat)
        for _ in trainer.optimizer.state():
            pass
        recorder.active = True
        trainer.train_step(random_batch(recipe, topology.dp, trainer.pipeline.reads_data))
        parameters = sum(math.prod(p.local_shape(topology.tp)) for s in trainer.stages for p in s.parameters.values())
        return RankRecord(rank, parameters, phantom.peak, recorder.collectives, recorder.messages)


def pipeline_messages(recipe: Recipe, topology: Topology, rank: int) -> list[Message]:
    """What a rank sends to and receives from its pipeline neighbours in one step, in order: those of `simulate_rank`,
    from the real schedule over stages that hold no blocks. Takes a fraction of a second."""
    unsharded = recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"zero": 1})})
    knobs = recipe.topology
    recorder = Recorder(active=True)
    with _in_a_world(unsharded, topology, rank, recorder) as (mesh, _):
        mine = stages_of(mesh.coordinates.pp, knobs.pp, knobs.virtual_stages, knobs.schedule)
        stages = [Stage(i, _Hollow(unsharded, mesh, i), {}) for i in mine]  # type: ignore[arg-type]
        pipeline = Pipeline(stages, mesh, unsharded)
        pipeline.train(random_batch(unsharded, topology.dp, pipeline.reads_data), 1.0)
    return recorder.messages


class _Hollow(nn.Module):
    """A pipeline stage's inputs and outputs, with one weight between them."""

    def __init__(self, recipe: Recipe, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.shape = Pipeline([], mesh, recipe).hidden()
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
def _in_a_world(recipe: Recipe, topology: Topology, rank: int, recorder: Recorder) -> Iterator[tuple[Mesh, Phantom]]:
    """This process as a rank whose peers answer at once, and whose tensors hold nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world_size)
    try:
        mesh = Mesh.from_recipe(recipe, topology, torch.device("cpu"))
        with (
            replaced(dist, "new_group", _fake_group(dist.new_group)),
            recorder.watching_pipeline(),
            replaced(F, "rms_norm", fused_rms_norm),
            Phantom(recorder) as phantom,
        ):
            yield mesh, phantom
    finally:
        dist.destroy_process_group()


def _fake_group(new_group):  # type: ignore[no-untyped-def]
    """No group of another backend: it would wait for its peers."""

    def made(*args, backend=None, **keywords):  # type: ignore[no-untyped-def]
        return new_group(*args, **keywords)

    return made
