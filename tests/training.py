"""A trainer without data files, for cases of the `world` pool."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.recipes import resolved

if TYPE_CHECKING:
    import torch


def trainer(raw: dict[str, Any], root: str, device: torch.device | None = None) -> Any:
    """The trainer of this rank, for a raw recipe, in a run directory; on the CPU, if no device is named."""
    import torch
    import torch.distributed as dist

    from tplaunch.parallel.mesh import Mesh
    from tplaunch.run.directory import RunDir
    from tplaunch.run.heartbeat import Heartbeat
    from tplaunch.train.stop import StopRequest
    from tplaunch.train.trainer import Trainer

    recipe = resolved(raw)
    run_dir = RunDir(Path(root))
    run_dir.create()
    heartbeat = Heartbeat(run_dir.root / f"beat-{dist.get_rank()}", dist.get_rank())
    return Trainer(recipe, Mesh.of(recipe, device or torch.device("cpu")), run_dir, StopRequest(), heartbeat)


def resumed(raw: dict[str, Any], root: str, tokenizer: str) -> Any:
    """The trainer of this rank after its start, in a run directory that has a tokenizer."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(root).mkdir(exist_ok=True)
        shutil.copy(tokenizer, root)
    dist.barrier()
    made = trainer(raw, root)
    made.resume("auto")
    return made


def batch(made: Any) -> Any:
    """This rank's share of the next step: random tokens that depend on the step only."""
    import numpy as np
    import torch

    from tplaunch.spec.course import Course
    from tplaunch.train.batch import Batch, share

    recipe, mesh = made.recipe, made.mesh
    samples = share(Course(recipe), made.progress.step + 1, mesh.coordinates.dp, mesh.topology.dp)
    length = recipe.training.seq_len + 1
    rows = [np.random.default_rng(sample).integers(0, recipe.model.vocab_size, length) for sample in samples]
    tokens = torch.from_numpy(np.stack(rows))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def train(made: Any, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of that many more steps."""
    results = [made.step.run(batch(made)) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]
