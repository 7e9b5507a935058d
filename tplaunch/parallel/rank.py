"""A rank of a helper module (bench, generate): it reads the request, joins the world, and rank 0 answers.

The other half of `tplaunch.launch.helper`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tplaunch.errors import TplaunchError
from tplaunch.files import write_atomic
from tplaunch.parallel.mesh import init_process_group, local_device
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.processes import die_with_parent
from tplaunch.torch_private import leave_out_dynamo


@dataclass(frozen=True)
class HelperRank:
    """One rank of a helper.

    Args:
        recipe: resolved.
        request: what is asked for.
        device: this rank's device.
        folder: where request and result lie.
    """

    recipe: Recipe
    request: Any
    device: torch.device
    folder: RunDir

    @property
    def main(self) -> bool:
        """Whether this rank speaks for all."""
        return dist.get_rank() == 0

    def answer(self, result: Any) -> None:
        """Leave a JSON value for the command that asked; only rank 0's counts."""
        if self.main:
            write_atomic(self.folder.result, json.dumps(result))


@contextmanager
def helper_rank(folder: str) -> Iterator[HelperRank]:
    """Join the world that torchrun describes, for the length of a `with` block. A user's mistake that a rank finds is
    left for the command that asked."""
    die_with_parent()
    place = RunDir(Path(folder))
    request = json.loads(place.request.read_text(encoding="utf-8"))
    recipe = load_recipe(place.recipe).recipe
    if not recipe.training.compile:
        leave_out_dynamo()
    device = local_device(int(os.environ["LOCAL_RANK"]))
    init_process_group(device, recipe.launch.first_step_timeout)
    try:
        yield HelperRank(recipe, request, device, place)
    except TplaunchError as error:
        write_atomic(place.refusal, json.dumps({"text": str(error), "code": int(error.code)}))
        raise
    dist.barrier()
    dist.destroy_process_group()
