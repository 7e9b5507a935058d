"""The loss over the validation data."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tplaunch.train.batch import make_batch, open_dataset
from tplaunch.train.step import TrainStep


def validate(step: TrainStep) -> float | None:
    """Mean loss over the targets of the validation data's first `eval_steps` global batches; None without such data.

    Every rank calls it; all get the same answer.
    """
    recipe, mesh = step.recipe, step.mesh
    sources = recipe.data.sources("validation")
    if not sources:
        return None
    training = recipe.training
    dataset = open_dataset(recipe, sources, shuffle=False)
    size = training.global_batch_size
    share = size // mesh.topology.dp
    batches = max(1, min(training.eval_steps, len(dataset) // size))
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    counted = 0
    for number in range(batches):
        first = number * size + mesh.coordinates.dp * share
        batch = make_batch(recipe, dataset, range(first, first + share)).to(mesh.device)
        targets = step.count_targets(batch, size * training.seq_len)
        total += step.pipeline.evaluate(batch, 1.0 / targets) * targets
        counted += targets
    if not step.pipeline.has_loss or mesh.tp.rank != 0:
        total.zero_()
    dist.all_reduce(total)
    return float(total) / counted
